//! Attention under Burn's fusion, as operations that it leaves alone.

use std::marker::PhantomData;

use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime, FusionTensor};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};

use super::super::{AttentionBackend, AttentionState};
use crate::segments::Segments;

/// Which of the two operations it is.
#[derive(Debug, Clone, Copy)]
enum Pass {
    /// Of `q`, `k` and `v`: the output and the log-sum-exp.
    Forward,
    /// Of these five and the output's gradient: those of `q`, `k` and `v`.
    Backward,
}

#[derive(Debug)]
struct Attention<B> {
    desc: CustomOpIr,
    pass: Pass,
    segments: Segments,
    backend: PhantomData<B>,
}

type Handles<B> =
    HandleContainer<<<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

impl<B: FusionBackend + AttentionBackend> Operation<B::FusionRuntime> for Attention<B> {
    fn execute(&self, handles: &mut Handles<B>) {
        let mut input = |at: usize| handles.get_float_tensor::<B>(&self.desc.inputs[at]);
        let (q, k, v) = (input(0), input(1), input(2));
        let outputs = match self.pass {
            Pass::Forward => {
                let (out, lse) = B::causal_attention(q, k, v, &self.segments);
                vec![out, lse]
            }
            Pass::Backward => {
                let saved = AttentionState {
                    q,
                    k,
                    v,
                    out: input(3),
                    lse: input(4),
                    segments: self.segments.clone(),
                };
                B::causal_attention_backward(saved, input(5)).into()
            }
        };
        for (desc, output) in self.desc.outputs.iter().zip(outputs) {
            handles.register_float_tensor::<B>(&desc.id, output);
        }
    }
}

/// Registers a pass whose outputs have these shapes and types.
fn register<B: FusionBackend + AttentionBackend, const OUTPUTS: usize>(
    pass: Pass,
    segments: Segments,
    inputs: Vec<FusionTensor<B::FusionRuntime>>,
    outputs: [(Shape, DType); OUTPUTS],
) -> [FusionTensor<B::FusionRuntime>; OUTPUTS] {
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let outputs =
        outputs.map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
    let inputs: Vec<TensorIr> = inputs.into_iter().map(|input| input.into_ir()).collect();
    let desc = CustomOpIr::new("attention", &inputs, &outputs);
    let operation = Attention::<B> {
        desc: desc.clone(),
        pass,
        segments,
        backend: PhantomData,
    };
    client
        .register(streams, OperationIr::Custom(desc), operation)
        .outputs()
}

impl<B: FusionBackend + AttentionBackend> AttentionBackend for Fusion<B> {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: &Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [n, n_h, _] = q.shape.dims();
        let outputs = [
            (q.shape.clone(), q.dtype),
            (Shape::from([n, n_h]), DType::F32),
        ];
        let inputs = vec![q, k, v];
        let [out, lse] = register::<B, 2>(Pass::Forward, segments.clone(), inputs, outputs);
        (out, lse)
    }

    fn causal_attention_backward(
        saved: AttentionState<Self>,
        d_out: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        let AttentionState {
            q,
            k,
            v,
            out,
            lse,
            segments,
        } = saved;
        let outputs = [&q, &k, &v].map(|x| (x.shape.clone(), x.dtype));
        let inputs = vec![q, k, v, out, lse, d_out];
        register::<B, 3>(Pass::Backward, segments, inputs, outputs)
    }
}
