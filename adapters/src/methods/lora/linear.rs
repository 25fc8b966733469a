//! The adapted layer as one operation: the update is added to the base layer's output where that
//! lies, and so are their gradients.
//!
//! Shapes: `n` tokens, `r` rank. Between forward and backward `s · drop(x) Aᵀ` `[n, r]` is kept and
//! of `x` what autodiff would compute it from; a dropout mask follows from its seed.

#[cfg(feature = "gpu")]
mod gpu;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::module::AutodiffModule;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};
use model::linear::Projection;
use model::ops::{MatmulBackend, add_matmul, matmul};
use quant::QuantBackend;

use super::Lora;
use crate::base::BaseLinear;
use crate::linear::{Dropout, DropoutBackend, dropped};

/// `x` `[n, in]` through a base layer and the low-rank update beside it: `[n, out]`.
pub fn lora_linear<B: LoraBackend>(
    x: Tensor<B, 2>,
    base: &BaseLinear<B>,
    lora: &Lora<B>,
) -> Tensor<B, 2> {
    tensor(B::lora_linear(primitive(x), base, lora))
}

/// The operation on a backend's own tensors.
pub trait LoraBackend: QuantBackend + MatmulBackend + DropoutBackend {
    /// See [`lora_linear`].
    fn lora_linear(
        x: FloatTensor<Self>,
        base: &BaseLinear<Self>,
        lora: &Lora<Self>,
    ) -> FloatTensor<Self> {
        let (y, _) = forward(tensor(x), base, &Update::of(lora));
        primitive(y)
    }
}

/// [`lora_linear`] in plain tensor operations.
pub fn reference<B: LoraBackend>(
    x: Tensor<B, 2>,
    base: &BaseLinear<B>,
    lora: &Lora<B>,
) -> Tensor<B, 2> {
    base.forward(x.clone()) + lora.addition(x)
}

impl LoraBackend for Flex {}

/// The low-rank update of a layer, for the backend that computes.
#[derive(Debug, Clone)]
struct Update<B: Backend> {
    /// `[r, in]`.
    a: Tensor<B, 2>,
    /// `[out, r]`.
    b: Tensor<B, 2>,
    scaling: f64,
    dropout: Option<Dropout>,
}

impl<B: Backend> Update<B> {
    fn of(lora: &Lora<B>) -> Self {
        Self {
            a: lora.lora_a.val(),
            b: lora.lora_b.val(),
            scaling: lora.scaling,
            dropout: lora.drops(),
        }
    }
}

/// The output `[n, out]`, and `s · drop(x) Aᵀ` `[n, r]`.
fn forward<B: LoraBackend>(
    x: Tensor<B, 2>,
    base: &BaseLinear<B>,
    update: &Update<B>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let [n, _] = x.dims();
    let (y, narrow) = B::join(
        n,
        || base.forward(x.clone()),
        || {
            let x = dropped(x.clone(), update.dropout);
            matmul(x, update.a.clone().transpose()).mul_scalar(update.scaling)
        },
    );
    let y = add_matmul(y, narrow.clone(), update.b.clone().transpose());
    (y, narrow)
}

#[derive(Debug)]
struct LoraLinearBackward;

/// What backward needs of forward.
#[derive(Debug, Clone)]
struct State<B: Backend> {
    base: BaseLinear<B>,
    update: Update<B>,
    /// `[n, r]`.
    narrow: Tensor<B, 2>,
    /// `x`, if `a` is trained.
    x: Option<NodeId>,
}

impl<B: LoraBackend> Backward<B, 3> for LoraLinearBackward {
    type State = State<B>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let State {
            base,
            update,
            narrow,
            x,
        } = ops.state;
        let [x_node, a_node, b_node] = ops.parents;
        let dy: Tensor<B, 2> = tensor(grads.consume::<B>(&ops.node));
        let mut register = |node: NodeId, gradient| grads.register::<B>(node, primitive(gradient));
        if let Some(node) = b_node {
            register(node.id, matmul(dy.clone().transpose(), narrow)); // [out, r]
        }
        let d_narrow = matmul(dy.clone(), update.b).mul_scalar(update.scaling); // [n, r]
        if let (Some(node), Some(x)) = (a_node, x) {
            let x = dropped(tensor(checkpointer.retrieve_node_output(x)), update.dropout);
            register(node.id, matmul(d_narrow.clone().transpose(), x)); // [r, in]
        }
        if let Some(node) = x_node {
            let dx = base.input_gradient(dy);
            register(
                node.id,
                match update.dropout {
                    None => add_matmul(dx, d_narrow, update.a),
                    Some(_) => dx + dropped(matmul(d_narrow, update.a), update.dropout),
                },
            );
        }
    }
}

impl<B: LoraBackend, C: CheckpointStrategy> LoraBackend for Autodiff<B, C> {
    fn lora_linear(
        x: FloatTensor<Self>,
        base: &BaseLinear<Self>,
        lora: &Lora<Self>,
    ) -> FloatTensor<Self> {
        if base.is_trained() {
            return primitive(reference(tensor(x), base, lora)); // of a weight that has a gradient, too
        }
        let (a, b) = (primitive(lora.lora_a.val()), primitive(lora.lora_b.val()));
        let base = base.valid();
        let update = Update {
            a: tensor(a.primitive.clone()),
            b: tensor(b.primitive.clone()),
            scaling: lora.scaling,
            dropout: lora.drops(),
        };
        let (y, narrow) = forward(tensor(x.primitive.clone()), &base, &update);
        match LoraLinearBackward
            .prepare::<C>([x.node.clone(), a.node.clone(), b.node.clone()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = State {
                    x: a.is_tracked().then(|| prep.checkpoint(&x)),
                    base,
                    update,
                    narrow,
                };
                prep.finish(state, primitive(y))
            }
            OpsKind::UnTracked(prep) => prep.finish(primitive(y)),
        }
    }
}

fn tensor<B: Backend>(primitive: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn primitive<B: Backend>(tensor: Tensor<B, 2>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::tensor::{DType, TensorData};
    use model::linear::Linear;
    use model::load::normal;
    use model::weight::BaseWeight;
    use quant::{Format, PackedWeight, QuantLinear, Scheme, quantize};

    use super::*;

    type Train = Autodiff<Flex>;

    const N: usize = 9;
    const IN: usize = 40;
    const OUT: usize = 24;
    const RANK: usize = 3;

    fn noise(name: &str, shape: [usize; 2]) -> Tensor<Train, 2> {
        let values = normal(1, name, shape[0] * shape[1], 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    fn lora(dropout: Option<Dropout>) -> Lora<Train> {
        Lora {
            lora_a: Param::from_tensor(noise("a", [RANK, IN])),
            lora_b: Param::from_tensor(noise("b", [OUT, RANK])),
            magnitude: None,
            base_squares: None,
            start: None,
            scaling: 0.7,
            dropout: dropout.map_or(0.0, |dropout| dropout.probability),
            seed: dropout.map(|dropout| dropout.seed),
        }
    }

    fn dense(trained: bool) -> BaseLinear<Train> {
        let weight = BaseWeight::Frozen(noise("w", [OUT, IN]));
        let weight = match trained {
            true => weight.trained("w"),
            false => weight,
        };
        let bias = BaseWeight::Frozen(noise("bias", [1, OUT]).squeeze_dim(0));
        BaseLinear::Dense(Linear {
            weight,
            bias: Some(bias),
        })
    }

    fn quantized() -> BaseLinear<Train> {
        let values = normal(1, "w", OUT * IN, 1.0);
        let weight = quantize(&values, [OUT, IN], Scheme::new(Format::Nf4, 64, false)).unwrap();
        BaseLinear::Quantized(QuantLinear {
            weight: PackedWeight::new(weight, &Default::default()),
            bias: Some(noise("bias", [1, OUT]).squeeze_dim(0)),
            dtype: DType::F32,
        })
    }

    /// Output and gradients, of `x`, if that is tracked, of `lora_a`, `lora_b` and a trained base.
    fn run(
        op: impl Fn(Tensor<Train, 2>, &BaseLinear<Train>, &Lora<Train>) -> Tensor<Train, 2>,
        base: &BaseLinear<Train>,
        dropout: Option<Dropout>,
        x_is_tracked: bool,
    ) -> Vec<Vec<f32>> {
        let lora = lora(dropout);
        let x = noise("x", [N, IN]);
        let x = match x_is_tracked {
            true => x.require_grad(),
            false => x,
        };
        let y = op(x.clone(), base, &lora);
        let grads = (y.clone() * noise("dy", [N, OUT])).sum().backward();
        let weight = match base {
            BaseLinear::Dense(linear) => linear.weight.val().grad(&grads),
            BaseLinear::Quantized(_) => None,
        };
        let (a, b) = (lora.lora_a.grad(&grads), lora.lora_b.grad(&grads));
        assert_eq!(x.grad(&grads).is_some(), x_is_tracked);
        let found = [Some(y.inner()), x.grad(&grads), a, b, weight];
        let values = |x: Tensor<Flex, 2>| x.into_data().to_vec::<f32>().unwrap();
        found.into_iter().flatten().map(values).collect()
    }

    #[test]
    fn output_and_gradients_equal_those_of_plain_operations() {
        let dropout = Dropout {
            probability: 0.3,
            seed: 5,
        };
        for (case, base) in [dense(false), quantized(), dense(true)].iter().enumerate() {
            for dropout in [None, Some(dropout)] {
                for x_is_tracked in [true, false] {
                    let found = run(lora_linear, base, dropout, x_is_tracked);
                    let expected = run(reference, base, dropout, x_is_tracked);
                    let count = 3 + usize::from(x_is_tracked) + usize::from(base.is_trained());
                    assert_eq!([found.len(), expected.len()], [count; 2]);
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let largest = expected.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
                        assert!(largest > 0.0);
                        for (x, y) in found.iter().zip(expected) {
                            let off = (x - y).abs() / largest;
                            assert!(
                                off < 2e-6,
                                "base {case}, {dropout:?}, tensor {i}: {x} for {y}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn frozen_factors_get_no_gradient_and_pass_on_that_of_x() {
        let mut lora = lora(None);
        lora.lora_a = lora.lora_a.set_require_grad(false);
        let x = noise("x", [N, IN]).require_grad();
        let grads = lora_linear(x.clone(), &dense(false), &lora)
            .sum()
            .backward();
        assert!(lora.lora_a.grad(&grads).is_none());
        assert!(lora.lora_b.grad(&grads).is_some());
        assert!(x.grad(&grads).is_some());
    }
}
