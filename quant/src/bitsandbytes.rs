//! 4-bit weights in a checkpoint, as bitsandbytes and transformers write and read them.
//!
//! A weight `NAME` is several tensors: `NAME` with the codes as bytes `[⌈len / 2⌉, 1]`,
//! `NAME.absmax`, `NAME.quant_map` with the code book and `NAME.quant_state.bitsandbytes__TYPE` with
//! JSON; if the absmax values are in 8 bits, too, `NAME.nested_absmax` and `NAME.nested_quant_map`.
//!
//! Source: `QuantState.as_dict` and `QuantState.from_dict` in `bitsandbytes/functional.py`;
//! `BitsAndBytesConfig` in `transformers/utils/quantization_config.py`.

use std::borrow::Cow;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Absmax, DoubleQuantized, Error, Format, NESTED_BLOCK_SIZE, Precision, Quantized, Result, Scheme,
};

/// Before the name of the format in the name of the part that describes the others.
const QUANT_STATE: &str = "quant_state.bitsandbytes__";
const FORMATS: [Format; 2] = [Format::Nf4, Format::Fp4];

/// The parts of a weight in a checkpoint, checked against each other and not yet read.
#[derive(Debug)]
pub struct Stored<'a> {
    name: String,
    shape: [usize; 2],
    format: Format,
    state: QuantState,
    codes: TensorView<'a>,
    absmax: TensorView<'a>,
    nested: Option<[TensorView<'a>; 2]>,
}

/// The JSON of `quant_state`.
#[derive(Debug, Serialize, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    #[serde(default)]
    nested_blocksize: Option<usize>,
    #[serde(default)]
    nested_dtype: Option<String>,
    #[serde(default)]
    nested_offset: Option<f64>,
}

/// Whether a checkpoint holds the weight `name` in 4 bits; `has` tells which tensors there are.
pub fn is_stored(name: &str, has: impl Fn(&str) -> bool) -> bool {
    FORMATS.iter().any(|format| has(&state_name(name, *format)))
}

/// The weight that a part belongs to, if it is named like one.
pub fn weight_of_part(part: &str) -> Option<&str> {
    const PARTS: [&str; 4] = [
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
    ];
    let by_state = part
        .split_once(&format!(".{QUANT_STATE}"))
        .map(|(weight, _)| weight);
    by_state.or_else(|| PARTS.iter().find_map(|suffix| part.strip_suffix(suffix)))
}

impl<'a> Stored<'a> {
    /// Finds the parts of the weight `name`, which the model takes as `shape`.
    ///
    /// # Errors
    /// If a part is missing, of another type or length than the others call for, or describes what
    /// is not supported; the error names it.
    pub fn find(
        name: &str,
        shape: [usize; 2],
        view: impl Fn(&str) -> Option<TensorView<'a>>,
    ) -> Result<Self> {
        let part = |suffix: &str| {
            let name = format!("{name}{suffix}");
            view(&name).ok_or(Error::MissingPart { name })
        };
        let format = FORMATS
            .into_iter()
            .find(|f| view(&state_name(name, *f)).is_some());
        let format = format.ok_or_else(|| Error::MissingPart {
            name: format!("{name}.{QUANT_STATE}nf4"),
        })?;
        let state_name = state_name(name, format);
        let text = view(&state_name).expect("found just now");
        let state: QuantState =
            serde_json::from_slice(text.data()).map_err(|source| Error::QuantState {
                name: state_name.clone(),
                reason: source.to_string(),
            })?;
        state.check(&state_name, format, shape)?;
        let nested = match state.nested_offset {
            None => None,
            Some(_) => Some([part(".nested_absmax")?, part(".nested_quant_map")?]),
        };
        let stored = Self {
            name: name.into(),
            shape,
            format,
            codes: part("")?,
            absmax: part(".absmax")?,
            nested,
            state,
        };
        stored.check_parts(name)?;
        let code_book = part(".quant_map")?;
        check_part(name, ".quant_map", &code_book, Dtype::F32, 16)?;
        if floats(&code_book) != format.code_book() {
            let name = format!("{name}.quant_map");
            let reason = format!("is not the code book of {}", format.name());
            return Err(Error::QuantState { name, reason });
        }
        Ok(stored)
    }

    /// Every part with the type and the number of values that shape and block size call for.
    fn check_parts(&self, name: &str) -> Result<()> {
        let len = self.shape[0] * self.shape[1];
        let blocks = len.div_ceil(self.state.blocksize);
        let check = |suffix: &str, part: &TensorView, dtype: Dtype, values: usize| {
            check_part(name, suffix, part, dtype, values)
        };
        check("", &self.codes, Dtype::U8, len.div_ceil(2))?;
        match &self.nested {
            None => check(".absmax", &self.absmax, Dtype::F32, blocks),
            Some([absmax, code_book]) => {
                check(".absmax", &self.absmax, Dtype::U8, blocks)?;
                let outer = blocks.div_ceil(NESTED_BLOCK_SIZE);
                check(".nested_absmax", absmax, Dtype::F32, outer)?;
                check(".nested_quant_map", code_book, Dtype::F32, 256)
            }
        }
    }

    /// The type that the weight had before it was quantised, and decodes to: see [`Precision`].
    pub fn dtype(&self) -> Dtype {
        dtype(&self.state.dtype).expect("checked when the parts were found")
    }

    /// Format and blocks.
    pub fn scheme(&self) -> Scheme {
        Scheme {
            format: self.format,
            block_size: self.state.blocksize,
            double_quant: self.nested.is_some(),
        }
    }

    /// Reads the parts.
    ///
    /// # Errors
    /// If a value that scales weights is infinite or NaN; the error names its tensor.
    pub fn read(&self) -> Result<Quantized> {
        let absmax = match &self.nested {
            None => Absmax::Plain(floats(&self.absmax)),
            Some([absmax, code_book]) => Absmax::Double(DoubleQuantized {
                codes: self.absmax.data().to_vec(),
                absmax: floats(absmax),
                offset: self.state.nested_offset.unwrap_or_default() as f32,
                code_book: floats(code_book)
                    .try_into()
                    .expect("256 values by the check"),
            }),
        };
        let codes = self.codes.data().to_vec();
        let weight = Quantized::new(self.shape, self.format, self.state.blocksize, codes, absmax);
        let weight = weight.map_err(|error| match error {
            Error::NonFinitePart { part, index, value } => Error::NonFinitePart {
                part: format!("{}.{part}", self.name),
                index,
                value,
            },
            other => other,
        })?;
        Ok(weight.with_precision(match self.dtype() {
            Dtype::F16 => Precision::F16,
            Dtype::BF16 => Precision::Bf16,
            _ => Precision::F32,
        }))
    }
}

fn check_part(
    name: &str,
    suffix: &str,
    part: &TensorView,
    dtype: Dtype,
    values: usize,
) -> Result<()> {
    let bytes = values * dtype.bitsize() / 8;
    if part.dtype() == dtype && part.data().len() == bytes {
        return Ok(());
    }
    Err(Error::WrongPart {
        name: format!("{name}{suffix}"),
        expected: format!("{values} values of type {dtype:?}"),
        found: format!("{:?} of type {:?}", part.shape(), part.dtype()),
    })
}

impl QuantState {
    fn check(&self, name: &str, format: Format, shape: [usize; 2]) -> Result<()> {
        let wrong = |key: &str, found: &dyn std::fmt::Display, expected: &str| {
            let reason = format!("{key} is {found}: expected {expected}");
            let name = name.to_owned();
            Err(Error::QuantState { name, reason })
        };
        if self.quant_type != format.name() {
            return wrong("quant_type", &self.quant_type, format.name());
        }
        if self.shape != shape {
            let found = format!("{:?}", self.shape);
            return wrong("shape", &found, &format!("{shape:?}, as the model has it"));
        }
        if crate::quantized::check_block_size(self.blocksize).is_err() {
            return wrong(
                "blocksize",
                &self.blocksize,
                "a power of two from 32 to 4096",
            );
        }
        if dtype(&self.dtype).is_none() {
            return wrong("dtype", &self.dtype, "float32, float16 or bfloat16");
        }
        match self.nested_blocksize {
            Some(size) if self.nested_offset.is_some() && size != NESTED_BLOCK_SIZE => {
                wrong("nested_blocksize", &size, "256")
            }
            _ => Ok(()),
        }
    }
}

/// A type by torch's name for it.
fn dtype(name: &str) -> Option<Dtype> {
    match name {
        "float32" => Some(Dtype::F32),
        "float16" => Some(Dtype::F16),
        "bfloat16" => Some(Dtype::BF16),
        _ => None,
    }
}

/// A tensor as it goes into a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Part<'a> {
    /// Name in the checkpoint.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements, little-endian.
    pub bytes: Cow<'a, [u8]>,
}

/// The parts of the weight `name`; `dtype` is what it decodes to when it is loaded again, in
/// torch's words.
pub fn parts<'a>(name: &str, weight: &'a Quantized, dtype: &str) -> Vec<Part<'a>> {
    let f32s = |suffix: &str, values: &'a [f32]| Part {
        name: format!("{name}{suffix}"),
        dtype: Dtype::F32,
        shape: vec![values.len()],
        bytes: bytemuck::cast_slice(values).into(),
    };
    let u8s = |suffix: &str, values: Cow<'a, [u8]>, shape: Vec<usize>| Part {
        name: format!("{name}{suffix}"),
        dtype: Dtype::U8,
        shape,
        bytes: values,
    };
    let codes = weight.codes();
    let mut parts = vec![u8s("", codes.into(), vec![codes.len(), 1])];
    let mut state = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{dtype}", "shape": [{}, {}]"#,
        weight.format().name(),
        weight.block_size(),
        weight.shape()[0],
        weight.shape()[1],
    );
    match weight.absmax() {
        Absmax::Plain(absmax) => parts.push(f32s(".absmax", absmax)),
        Absmax::Double(double) => {
            let codes = double.codes.as_slice();
            parts.push(u8s(".absmax", codes.into(), vec![codes.len()]));
            parts.push(f32s(".nested_absmax", &double.absmax));
            parts.push(f32s(".nested_quant_map", &*double.code_book));
            state += &format!(
                r#", "nested_blocksize": {NESTED_BLOCK_SIZE}, "nested_dtype": "float32", "nested_offset": {}"#,
                python_float(f64::from(double.offset)),
            );
        }
    }
    parts.push(f32s(".quant_map", weight.format().code_book()));
    state.push('}');
    let shape = vec![state.len()];
    let suffix = format!(".{QUANT_STATE}{}", weight.format().name());
    parts.push(u8s(&suffix, state.into_bytes().into(), shape));
    parts
}

/// A number as Python prints it, so that the JSON has bitsandbytes' bytes.
fn python_float(x: f64) -> String {
    // The shortest digits that give x again. Of two that are as near Python takes the even one, and
    // so does Rust where it is told how many there are.
    let shortest = format!("{x:e}");
    let (digits, _) = split_exponent(&shortest);
    let decimals = digits.split_once('.').map_or(0, |(_, after)| after.len());
    let scientific = format!("{x:.decimals$e}");
    let (digits, exponent) = split_exponent(&scientific);
    match exponent {
        0..16 if x.fract() == 0.0 => format!("{x:.1}"),
        -4..16 => format!("{x:.*}", (decimals as i32 - exponent).max(1) as usize),
        exponent if exponent < 0 => format!("{digits}e-{:02}", -exponent),
        exponent => format!("{digits}e+{exponent:02}"),
    }
}

/// The two sides of the `e`.
fn split_exponent(scientific: &str) -> (&str, i32) {
    let (digits, exponent) = scientific.split_once('e').expect("it has an exponent");
    (digits, exponent.parse().expect("it is a number"))
}

/// `quantization_config` of a `config.json`, as transformers writes it.
pub fn config(scheme: Scheme, compute_dtype: &str) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.format.name(),
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

/// What a `quantization_config` says of the weights, which [`Stored`] reads; their block size is
/// not in it and stands for transformers' own.
///
/// # Errors
/// [`Error::QuantConfig`] with the key that describes something else.
pub fn check_config(config: &Value) -> Result<Scheme> {
    let get = |key: &str| config.get(key).unwrap_or(&Value::Null);
    let is_true = |key: &str| get(key) == &Value::Bool(true);
    let unsupported = |key: &'static str| Error::QuantConfig {
        key,
        found: get(key).to_string(),
    };
    let method = get("quant_method");
    if method != "bitsandbytes" && !(method.is_null() && is_true("load_in_4bit")) {
        return Err(unsupported("quant_method"));
    }
    if !is_true("load_in_4bit") {
        return Err(match is_true("load_in_8bit") {
            true => unsupported("load_in_8bit"),
            false => unsupported("load_in_4bit"),
        });
    }
    let format = match get("bnb_4bit_quant_type") {
        Value::Null => Format::Fp4, // transformers' default
        Value::String(name) => {
            Format::from_name(name).ok_or_else(|| unsupported("bnb_4bit_quant_type"))?
        }
        _ => return Err(unsupported("bnb_4bit_quant_type")),
    };
    Ok(Scheme::new(
        format,
        Scheme::DEFAULT_BLOCK_SIZE,
        is_true("bnb_4bit_use_double_quant"),
    ))
}

fn state_name(weight: &str, format: Format) -> String {
    format!("{weight}.{QUANT_STATE}{}", format.name())
}

/// The elements of a part; whole ones, as its length has been checked.
fn floats(part: &TensorView) -> Vec<f32> {
    let (elements, _) = part.data().as_chunks();
    elements
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_printed_as_python_prints_them() {
        for (x, text) in [
            (f64::from(0.125_691_22_f32), "0.125691220164299"),
            (f64::from(0.182_422_64_f32), "0.18242263793945312"), // as near to …313
            (0.5, "0.5"),
            (0.0, "0.0"),
            (3.0, "3.0"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (0.0001, "0.0001"),
            (0.000_012_5, "1.25e-05"),
            (f64::from(0.02_f32), "0.019999999552965164"),
            (-2.5e-7, "-2.5e-07"),
        ] {
            assert_eq!(python_float(x), text);
        }
    }

    #[test]
    fn parts_belong_to_their_weight() {
        let weight = Some("a.weight");
        assert_eq!(weight_of_part("a.weight.absmax"), weight);
        assert_eq!(weight_of_part("a.weight.nested_quant_map"), weight);
        assert_eq!(
            weight_of_part("a.weight.quant_state.bitsandbytes__fp4"),
            weight
        );
        assert_eq!(weight_of_part("a.weight"), None);
    }

    #[test]
    fn other_quantizations_are_named() {
        let error = |config: Value| check_config(&config).unwrap_err().to_string();
        let bnb = |key: &str, value: Value| {
            let mut config = config(
                Scheme {
                    format: Format::Nf4,
                    block_size: 64,
                    double_quant: false,
                },
                "float32",
            );
            assert_eq!(
                check_config(&config),
                Ok(Scheme::new(Format::Nf4, 64, false))
            );
            config[key] = value;
            config
        };
        assert!(
            error(json!({"quant_method": "gptq", "bits": 4})).contains("quant_method is \"gptq\"")
        );
        assert!(
            error(bnb("bnb_4bit_quant_type", "af4".into()))
                .contains("bnb_4bit_quant_type is \"af4\"")
        );
        let mut int8 = bnb("load_in_8bit", true.into());
        int8["load_in_4bit"] = false.into();
        assert!(error(int8).contains("load_in_8bit is true"));
        assert!(error(Value::from(3)).contains("quant_method is null"));
    }
}
