//! What is dropped, on CubeCL's backends, bare and under Burn's fusion: masks are made where they are
//! used, and no more than a seed goes there.

use std::marker::PhantomData;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime, get_client};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::{Dropout, DropoutBackend};

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> DropoutBackend
    for CubeBackend<R, F, I, BT>
{
    fn dropout_mask(
        dropout: Dropout,
        shape: [usize; 2],
        device: &Self::Device,
    ) -> FloatTensor<Self> {
        let count = shape[0] * shape[1];
        assert!(u32::try_from(count).is_ok(), "the kernel counts in 32 bits");
        let client = R::client(device);
        let shape = Shape::from(shape);
        let mask = empty_device_contiguous_dtype(client.clone(), device.clone(), shape, DType::F32);
        let cube = CubeDim::new(&client, count);
        dropout_mask::launch::<R>(
            &client,
            calculate_cube_count_elemwise(&client, count, cube),
            cube,
            mask.clone().into_array_arg(),
            dropout.seed as u32,
            (dropout.seed >> 32) as u32,
            dropout.threshold(),
            dropout.kept(),
        );
        mask
    }
}

/// An element a unit, see [`Dropout::elements`].
#[cube(launch)]
fn dropout_mask(mask: &mut Array<f32>, low: u32, high: u32, threshold: u32, kept: f32) {
    if ABSOLUTE_POS < mask.len() {
        let sum = low + ABSOLUTE_POS as u32;
        let carry = select(sum < low, 1u32, 0u32);
        let x = Wide {
            low: sum,
            high: high + carry,
        };
        let x = times(x, 0x9e37_79b9u32, 0x7f4a_7c15u32);
        let x = times(folded(x, 30u32), 0xbf58_476du32, 0x1ce4_e5b9u32);
        let x = times(folded(x, 27u32), 0x94d0_49bbu32, 0x1331_11ebu32);
        let bits = x.high ^ (x.high >> 31u32);
        mask[ABSOLUTE_POS] = select(bits < threshold, 0.0f32, kept);
    }
}

/// A number of 64 bits, which not every device has.
#[derive(CubeType, Clone, Copy)]
struct Wide {
    low: u32,
    high: u32,
}

/// The lower 64 bits of a product.
#[cube]
fn times(x: Wide, #[comptime] high: u32, #[comptime] low: u32) -> Wide {
    let by_low = u32::new(comptime!(low as i64));
    let by_high = u32::new(comptime!(high as i64));
    Wide {
        low: x.low * by_low,
        high: x.low.mul_hi(by_low) + x.high * by_low + x.low * by_high,
    }
}

/// `x ^ (x >> shift)`.
#[cube]
fn folded(x: Wide, #[comptime] shift: u32) -> Wide {
    let across = comptime!(32 - shift);
    Wide {
        low: x.low ^ ((x.low >> shift) | (x.high << across)),
        high: x.high ^ (x.high >> shift),
    }
}

#[derive(Debug)]
struct Mask<B: FusionBackend> {
    desc: CustomOpIr,
    dropout: Dropout,
    shape: [usize; 2],
    device: B::Device,
    backend: PhantomData<B>,
}

type Handles<B> =
    HandleContainer<<<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

impl<B: FusionBackend + DropoutBackend> Operation<B::FusionRuntime> for Mask<B> {
    fn execute(&self, handles: &mut Handles<B>) {
        let mask = B::dropout_mask(self.dropout, self.shape, &self.device);
        handles.register_float_tensor::<B>(&self.desc.outputs[0].id, mask);
    }
}

impl<B: FusionBackend + DropoutBackend> DropoutBackend for Fusion<B> {
    fn dropout_mask(
        dropout: Dropout,
        shape: [usize; 2],
        device: &Self::Device,
    ) -> FloatTensor<Self> {
        let client = get_client::<B>(device);
        let handle = client.create_empty_handle();
        let mask = TensorIr::uninit(handle, Shape::from(shape), DType::F32);
        let desc = CustomOpIr::new("dropout_mask", &[], &[mask]);
        let operation = Mask::<B> {
            desc: desc.clone(),
            dropout,
            shape,
            device: device.clone(),
            backend: PhantomData,
        };
        let streams = OperationStreams::default();
        client
            .register(streams, OperationIr::Custom(desc), operation)
            .output()
    }
}

/// As the other kernels are, see `quant::matmul`.
#[cfg(all(test, feature = "cuda", feature = "wgpu"))]
mod tests {
    use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
    use cubecl::{CubeTask, Runtime};
    use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

    use super::*;

    #[test]
    #[ignore = "needs NVRTC and CUDA's headers: .ci/nvrtc brings them"]
    fn cuda_compiles_the_kernel() {
        let include = std::env::var("CUDA_INCLUDE").expect("the folder of CUDA's headers");
        let settings = KernelSettings::default()
            .cube_dim(CubeDim::new_1d(256))
            .address_type(AddressType::U32);
        let mask = ArrayCompilationArg { inplace: None };
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        let kernel =
            dropout_mask::DropoutMask::<WgpuRuntime>::new(settings, client, mask, (), (), (), ());
        let task = KernelTask::<cubecl::cuda::CudaCompiler, _>::new(kernel);
        let address = AddressType::U32.unsigned_type();
        let mode = ExecutionMode::Checked;
        let compiled = task.compile(&mut Default::default(), &Default::default(), mode, address);
        let source = compiled.expect("CubeCL knows how").source;
        for architecture in ["sm_75", "sm_80", "sm_89", "sm_90a"] {
            let options = CompileOptions {
                options: vec![format!("--gpu-architecture={architecture}")],
                include_paths: vec![include.clone()],
                ..CompileOptions::default()
            };
            let ptx = compile_ptx_with_opts(&source, options);
            let ptx = ptx.unwrap_or_else(|error| panic!("for {architecture}: {error}"));
            assert!(ptx.to_src().contains(".entry"), "{architecture}");
        }
    }
}
