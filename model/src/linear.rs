//! Linear layers: what the network asks of them, and the plain one.

use burn::module::{Module, ModuleDisplay};
use burn::tensor::{DType, Int, Tensor, backend::Backend};

use crate::ops::MatmulBackend;
use crate::weight::BaseWeight;

/// A linear layer of the decoder, adapted or not.
pub trait Projection<B: Backend>: Module<B> + ModuleDisplay + Sync {
    /// `x` `[n, in]` to `[n, out]`.
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2>;

    /// The same of an `x` whose rows are one at `ids` `[n]` and zero elsewhere.
    fn embed(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2>;
}

/// `y = x Wᵀ + b`.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`, as in the checkpoint.
    pub weight: BaseWeight<B, 2>,
    /// `[out]`.
    pub bias: Option<BaseWeight<B, 1>>,
}

impl<B: MatmulBackend> Projection<B> for Linear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = self.weight.product(x); // [n, out]
        match &self.bias {
            Some(bias) => y + bias.val().unsqueeze(),
            None => y,
        }
    }

    fn embed(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        let columns = self.weight.val().transpose().select(0, ids); // [n, out]
        let columns = columns.cast(DType::F32);
        match &self.bias {
            Some(bias) => columns + bias.val().unsqueeze(),
            None => columns,
        }
    }
}

impl<B: Backend> Linear<B> {
    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        match &self.weight {
            BaseWeight::Frozen(tensor) => tensor.dims(),
            BaseWeight::Split(parts) => {
                let rows = parts.iter().map(|part| part.dims()[0]).sum();
                [rows, parts.first().map_or(0, |part| part.dims()[1])]
            }
            BaseWeight::Trained(param) => param.dims(),
        }
    }
}
