//! Outputs that are computed again in backward instead of being kept: those of cheap operations
//! whose inputs are kept anyway.
//!
//! Who needs such an output for its own backward asks autodiff for it (`OpsPrep::checkpoint`, as
//! Burn's matrix product does) and gets it computed again when it is there; it is freed after its
//! last use.

use std::fmt;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{
    retro_forward::RetroForward, state::BackwardStates, strategy::BalancedCheckpointing,
};
use burn::backend::autodiff::ops::{Backward, OpsKind};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;

/// Prepares an operation that is `forward` of its `inputs`, and is computed again wherever its
/// output is needed in backward.
pub(super) fn prepare<B: Backend, O: Backward<B, N>, const N: usize>(
    backward: O,
    inputs: [&FloatTensor<Autodiff<B>>; N],
    forward: impl Fn([FloatTensor<B>; N]) -> FloatTensor<B> + Send + 'static,
) -> OpsKind<O, B, O::State, BalancedCheckpointing, N> {
    let operation = backward.prepare::<BalancedCheckpointing>(inputs.map(|x| x.node.clone()));
    let tracked: Vec<_> = inputs.into_iter().filter(|x| x.is_tracked()).collect();
    if tracked.is_empty() {
        return operation.compute_bound().stateful(); // it is in no graph that could compute it
    }
    let again = Again {
        inputs: inputs.map(|x| match x.is_tracked() {
            true => Input::<B>::Node(x.node.id),
            false => Input::Constant(x.primitive.clone()),
        }),
        forward,
    };
    let operation = operation.memory_bound().retro_forward(again);
    operation.parents(tracked).stateful()
}

struct Again<B: Backend, F, const N: usize> {
    inputs: [Input<B>; N],
    forward: F,
}

#[derive(Clone)]
enum Input<B: Backend> {
    /// An output that autodiff knows, kept or computed again.
    Node(NodeId),
    Constant(FloatTensor<B>),
}

impl<B, F, const N: usize> RetroForward for Again<B, F, N>
where
    B: Backend,
    F: Fn([FloatTensor<B>; N]) -> FloatTensor<B> + Send + 'static,
{
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let inputs = self.inputs.each_ref().map(|input| match input {
            Input::Node(id) => states.get_state::<FloatTensor<B>>(id),
            Input::Constant(x) => x.clone(),
        });
        states.save(out_node, (self.forward)(inputs));
    }
}

impl<B: Backend, F, const N: usize> fmt::Debug for Again<B, F, N> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Again")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use burn::backend::Flex;
    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::Ops;
    use burn::tensor::Tensor;
    use burn::tensor::ops::FloatTensorOps;

    use super::*;
    use crate::ops::test::{Train, assert_close, grads_of, random};
    use crate::ops::{matmul, primitive, rms_norm, swiglu, tensor};

    #[derive(Debug)]
    struct Negate;

    impl Backward<Flex, 1> for Negate {
        type State = ();

        fn backward(self, ops: Ops<(), 1>, grads: &mut Gradients, _: &mut Checkpointer) {
            let dy = grads.consume::<Flex>(&ops.node);
            if let [Some(node)] = ops.parents {
                grads.register::<Flex>(node.id, Flex::float_neg(dy));
            }
        }
    }

    /// `-x`, and how often it is computed again.
    fn negate(x: Tensor<Train, 2>, again: &Arc<AtomicUsize>) -> Tensor<Train, 2> {
        let (x, again) = (primitive(x), again.clone());
        let operation = prepare(Negate, [&x], move |[x]| {
            again.fetch_add(1, Relaxed);
            Flex::float_neg(x)
        });
        let y = Flex::float_neg(x.primitive);
        tensor(match operation {
            OpsKind::Tracked(prep) => prep.finish((), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        })
    }

    #[test]
    fn an_output_is_computed_again_once_and_only_where_it_is_needed() {
        let count = Arc::new(AtomicUsize::new(0));
        let inputs = [random([3, 4], 1), random([4, 5], 2), random([4, 5], 3)];
        let run = |op: &dyn Fn(Tensor<Train, 2>) -> Tensor<Train, 2>| {
            grads_of(inputs.clone(), |[x, a, b]| {
                let y = op(x);
                matmul(y.clone(), a) + matmul(y, b)
            })
        };
        let found = run(&|x| negate(x, &count));
        assert_eq!(count.load(Relaxed), 1);
        assert_close(found, run(&|x| x.neg()), 0.0);
        grads_of([random([3, 4], 1)], |[x]| negate(x, &count));
        assert_eq!(count.load(Relaxed), 1, "nobody needed it");
    }

    #[test]
    fn trained_weights_get_the_gradients_of_inputs_that_are_kept() {
        let weights = [random([8, 6], 1), random([8, 6], 2), random([6, 5], 3)];
        let gain = random([1, 8], 4);
        for (x_is_tracked, gain_is_tracked) in
            [(true, true), (true, false), (false, true), (false, false)]
        {
            let run = |norm: &dyn Fn(Tensor<Train, 2>, Tensor<Train, 2>) -> Tensor<Train, 2>,
                       gate: &dyn Fn(Tensor<Train, 2>, Tensor<Train, 2>) -> Tensor<Train, 2>| {
                let [gate_proj, up_proj, down_proj] = weights.clone();
                let inputs = [random([4, 8], 5), gain.clone(), gate_proj, up_proj, down_proj];
                let [x, gain] = [inputs[0].clone(), inputs[1].clone()];
                grads_of(inputs, |[tracked_x, tracked_gain, gate_proj, up_proj, down_proj]| {
                    let of = |is_tracked, tracked: Tensor<Train, 2>, plain: Tensor<Flex, 2>| match is_tracked {
                        true => tracked,
                        false => Tensor::from_inner(plain),
                    };
                    // `grads_of` wants every input to be used
                    let rest = (tracked_x.clone().sum() + tracked_gain.clone().sum()).mul_scalar(0.5);
                    let x = of(x_is_tracked, tracked_x, x.clone());
                    let gain = of(gain_is_tracked, tracked_gain, gain.clone());
                    let normed = norm(x, gain);
                    let y = gate(matmul(normed.clone(), gate_proj), matmul(normed, up_proj));
                    matmul(y, down_proj) + rest.unsqueeze()
                })
            };
            let fused = run(&|x, gain| rms_norm(x, gain.squeeze_dim(0), 1e-5), &swiglu);
            let plain = run(
                &|x, gain| {
                    let squares = (x.clone() * x.clone()).mean_dim(1).add_scalar(1e-5);
                    x / squares.sqrt() * gain
                },
                &|gate, up| gate.clone() / gate.neg().exp().add_scalar(1.0) * up,
            );
            assert_close(fused, plain, 1e-5);
        }
    }
}
