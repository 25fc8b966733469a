//! Parity with bitsandbytes 0.50.2, to the bit (see `fixtures/nf4/make.py`).

use std::path::{Path, PathBuf};

use quant::{Absmax, Format, Quantized, Scheme, quantize};
use safetensors::SafeTensors;

/// One file of `fixtures/nf4`.
struct Case {
    name: String,
    bytes: Vec<u8>,
    format: Format,
    block_size: usize,
    double_quant: bool,
}

impl Case {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().as_ref().unwrap();
        let format = match metadata["quant_type"].as_str() {
            "nf4" => Format::Nf4,
            "fp4" => Format::Fp4,
            other => panic!("{}: {other}", path.display()),
        };
        Self {
            name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
            format,
            block_size: metadata["block_size"].parse().unwrap(),
            double_quant: metadata["double_quant"] == "True",
            bytes,
        }
    }

    fn u8s(&self, tensor: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap()
            .tensor(tensor)
            .unwrap()
            .data()
            .to_vec()
    }

    fn f32s(&self, tensor: &str) -> Vec<f32> {
        self.u8s(tensor)
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(f32::from_le_bytes)
            .collect()
    }

    fn shape(&self) -> [usize; 2] {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        tensors
            .tensor("weight")
            .unwrap()
            .shape()
            .try_into()
            .unwrap()
    }

    fn quantize(&self) -> Quantized {
        let weight = self.f32s("weight");
        quantize(
            &weight,
            self.shape(),
            Scheme::new(self.format, self.block_size, self.double_quant),
        )
        .unwrap()
    }
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nf4");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "safetensors")
        })
        .collect();
    paths.sort();
    assert_eq!(paths.len(), 12);
    paths.iter().map(|path| Case::read(path)).collect()
}

/// Equal to the bit; on a difference, says where the first one is.
fn assert_bits(case: &Case, tensor: &str, found: &[f32]) {
    let expected = case.f32s(tensor);
    assert_eq!(found.len(), expected.len(), "{}: {tensor}", case.name);
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(
            found.to_bits(),
            expected.to_bits(),
            "{}: {tensor}[{i}]: {found} {expected}",
            case.name
        );
    }
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    for case in cases() {
        assert_bits(&case, "code", case.format.code_book());
    }
}

#[test]
fn packed_codes_are_those_of_bitsandbytes() {
    for case in cases() {
        assert_eq!(case.quantize().codes(), case.u8s("packed"), "{}", case.name);
    }
}

#[test]
fn absmax_is_that_of_bitsandbytes() {
    for case in cases() {
        match case.quantize().absmax() {
            Absmax::Plain(absmax) => assert_bits(&case, "absmax", absmax),
            Absmax::Double(double) => {
                assert_eq!(double.codes, case.u8s("absmax_u8"), "{}", case.name);
                assert_bits(&case, "absmax2", &double.absmax);
                assert_bits(&case, "offset", &[double.offset]);
                assert_bits(&case, "code2", &*double.code_book);
            }
        }
    }
}

#[test]
fn dequantised_weights_are_those_of_bitsandbytes() {
    for case in cases() {
        assert_bits(&case, "dequant", &case.quantize().dequantize());
    }
}

#[test]
fn cases_cover_both_formats_with_and_without_double_quantization() {
    for format in [Format::Nf4, Format::Fp4] {
        for double_quant in [false, true] {
            let covered = |case: &Case| case.format == format && case.double_quant == double_quant;
            assert!(cases().iter().any(covered), "{format:?} {double_quant}");
        }
    }
}
