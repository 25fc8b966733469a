//! The weights of the network: frozen, or trained.

use burn::module::{
    AutodiffModule, Content, Devices, EmptyRecord, Module, ModuleDisplay, ModuleDisplayDefault,
    ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::{
    DType, Int, Tensor, TensorData,
    backend::{AutodiffBackend, Backend},
};

use crate::ops::{MatmulBackend, cat, weight_matmul};

/// A tensor of the base model.
///
/// Frozen weights are plain tensors and no parameters, so that gradients and optimizers know only
/// what is trained; `Trained` serves full fine-tuning and PEFT's `modules_to_save`.
#[derive(Debug, Clone)]
pub enum BaseWeight<B: Backend, const D: usize> {
    /// Not trained.
    Frozen(Tensor<B, D>),
    /// Not trained, some rows each: together they are more than the device takes as one tensor.
    Split(Vec<Tensor<B, D>>),
    /// Trained as a whole.
    Trained(Param<Tensor<B, D>>),
}

impl<B: Backend, const D: usize> BaseWeight<B, D> {
    /// A frozen weight of numbers from the host, in `dtype`; in parts if it has more than `most` bytes.
    pub fn from_data(
        values: Vec<f32>,
        shape: [usize; D],
        most: Option<u64>,
        (device, dtype): (&B::Device, DType),
    ) -> Self {
        let row = values.len() / shape[0].max(1);
        let rows = most.map_or(shape[0], |most| most as usize / (row * dtype.size()).max(1));
        let tensor = |values: Vec<f32>, rows| {
            let mut shape = shape;
            shape[0] = rows;
            Tensor::from_data(TensorData::new(values, shape), (device, dtype))
        };
        if rows >= shape[0] {
            return Self::Frozen(tensor(values, shape[0]));
        }
        let parts = values.chunks(row * rows.max(1));
        Self::Split(
            parts
                .map(|part| tensor(part.to_vec(), part.len() / row))
                .collect(),
        )
    }

    /// The tensor, tracked by autodiff if it is trained. Not for what the device does not take as one.
    pub fn val(&self) -> Tensor<B, D> {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Split(parts) => cat(parts.clone(), 0),
            Self::Trained(param) => param.val(),
        }
    }

    /// Whether it is in parts.
    pub fn is_split(&self) -> bool {
        matches!(self, Self::Split(_))
    }

    /// The same weight as a parameter, which is f32; `name` decides its id.
    pub fn trained(self, name: &str) -> Self {
        Self::Trained(named_param(name, self.val().cast(DType::F32)))
    }
}

impl<B: Backend> BaseWeight<B, 2> {
    /// Rows `ids` `[n]` of the weight `[rows, d]`, in f32: `[n, d]`.
    pub fn select(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        let Self::Split(parts) = self else {
            return self.val().select(0, ids).cast(DType::F32);
        };
        let mut first = 0;
        let found = parts.iter().map(|part| {
            let [rows, d] = part.dims();
            let (here, last) = (ids.clone() - first, rows as i64 - 1);
            first += rows as i64;
            let found = part.clone().select(0, here.clone().clamp(0, last));
            let is_other = here.clone().lower_elem(0).bool_or(here.greater_elem(last));
            let is_other = is_other.unsqueeze_dim::<2>(1).expand([-1, d as i64]);
            found.cast(DType::F32).mask_fill(is_other, 0.0)
        });
        found
            .reduce(|all, found| all + found)
            .expect("a weight has parts")
    }
}

impl<B: MatmulBackend> BaseWeight<B, 2> {
    /// `x` `[n, in]` times the transposed weight `[out, in]`: `[n, out]`.
    pub fn product(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let products = |part: Tensor<B, 2>| weight_matmul(x.clone(), part.transpose());
        match self {
            Self::Split(parts) => cat(parts.iter().cloned().map(products).collect(), 1),
            _ => products(self.val()),
        }
    }

    /// `dy` `[n, out]` times the weight `[out, in]`: `[n, in]`.
    pub fn input_gradient(&self, dy: Tensor<B, 2>) -> Tensor<B, 2> {
        let Self::Split(parts) = self else {
            return weight_matmul(dy, self.val());
        };
        let mut first = 0;
        let products = parts.iter().map(|part| {
            let [rows, _] = part.dims();
            let dy = dy.clone().narrow(1, first, rows);
            first += rows;
            weight_matmul(dy, part.clone())
        });
        products
            .reduce(|sum, dx| sum + dx)
            .expect("a weight has parts")
    }
}

/// A parameter whose id follows from its name, so that a resumed run finds its optimizer state.
pub fn named_param<B: Backend, const D: usize>(
    name: &str,
    tensor: Tensor<B, D>,
) -> Param<Tensor<B, D>> {
    Param::initialized(param_id(name), tensor.require_grad())
}

/// The 64-bit FNV-1a hash of a parameter's name
/// (<http://www.isthe.com/chongo/tech/comp/fnv/index.html>).
pub fn param_id(name: &str) -> ParamId {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    ParamId::from(hash)
}

// Burn's derive gives an enum's record the variant's name and panics on another one, and its
// fields one tensor type each; the few lines by hand do neither.
impl<B: Backend, const D: usize> Module<B> for BaseWeight<B, D> {
    type Record = EmptyRecord;

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        if let Self::Trained(param) = self {
            param.visit(visitor);
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        match self {
            Self::Trained(param) => Self::Trained(Module::<B>::map(param, mapper)),
            frozen => frozen,
        }
    }

    fn load_record(self, _: EmptyRecord) -> Self {
        self
    }

    fn into_record(self) -> EmptyRecord {
        EmptyRecord
    }

    fn to_device(self, device: &B::Device) -> Self {
        match self {
            Self::Frozen(tensor) => Self::Frozen(tensor.to_device(device)),
            Self::Split(parts) => Self::Split(
                parts
                    .into_iter()
                    .map(|part| part.to_device(device))
                    .collect(),
            ),
            Self::Trained(param) => Self::Trained(param.to_device(device)),
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            // A leaf again, as `Param::fork` makes one: backward adds the gradients of a tensor up
            // in the order of how far its uses are from leaves, frozen ones included.
            Self::Frozen(tensor) => Self::Frozen(tensor.to_device(device).detach()),
            Self::Split(parts) => {
                let part = |part: Tensor<B, D>| part.to_device(device).detach();
                Self::Split(parts.into_iter().map(part).collect())
            }
            Self::Trained(param) => Self::Trained(param.fork(device)),
        }
    }

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        match self {
            Self::Frozen(tensor) => Module::<B>::collect_devices(tensor, devices),
            Self::Split(parts) => Module::<B>::collect_devices(parts, devices),
            Self::Trained(param) => param.collect_devices(devices),
        }
    }
}

impl<B: AutodiffBackend, const D: usize> AutodiffModule<B> for BaseWeight<B, D> {
    type InnerModule = BaseWeight<B::InnerBackend, D>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Frozen(tensor) => BaseWeight::Frozen(tensor.clone().inner()),
            Self::Split(parts) => {
                BaseWeight::Split(parts.iter().map(|part| part.clone().inner()).collect())
            }
            Self::Trained(param) => BaseWeight::Trained(param.valid()),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            BaseWeight::Frozen(tensor) => Self::Frozen(Tensor::from_inner(tensor)),
            BaseWeight::Split(parts) => {
                Self::Split(parts.into_iter().map(Tensor::from_inner).collect())
            }
            BaseWeight::Trained(param) => Self::Trained(Param::from_inner(param)),
        }
    }
}

impl<B: Backend, const D: usize> ModuleDisplayDefault for BaseWeight<B, D> {
    fn content(&self, content: Content) -> Option<Content> {
        let state = match self {
            Self::Frozen(_) | Self::Split(_) => "frozen",
            Self::Trained(_) => "trained",
        };
        content.add_single(&state.to_string()).optional()
    }
}

impl<B: Backend, const D: usize> ModuleDisplay for BaseWeight<B, D> {}

#[cfg(test)]
mod tests {
    use burn::backend::{Autodiff, Flex};
    use burn::tensor::Tolerance;

    use super::*;

    type B = Autodiff<Flex>;

    /// A weight `[7, 3]` as a whole, and in parts of 2 rows, the last of 1.
    fn weights() -> [BaseWeight<B, 2>; 2] {
        let values: Vec<f32> = (0..21).map(|i| (i as f32).sin()).collect();
        let device = Default::default();
        [None, Some(2 * 3 * 4)]
            .map(|most| BaseWeight::from_data(values.clone(), [7, 3], most, (&device, DType::F32)))
    }

    fn same<const D: usize>([a, b]: [Tensor<B, D>; 2]) {
        let tolerance = Tolerance::<f32>::absolute(1e-6);
        a.into_data().assert_approx_eq(&b.into_data(), tolerance);
    }

    #[test]
    fn a_weight_in_parts_is_the_whole_one() {
        let weights = weights();
        assert!(matches!(&weights[1], BaseWeight::Split(parts) if parts.len() == 4));
        let device = Default::default();
        let x = || Tensor::<B, 2>::from_data([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], &device);
        let dy = || weights[0].product(x()) * 0.5; // [2, 7]
        same(weights.each_ref().map(BaseWeight::val));
        same(weights.each_ref().map(|weight| weight.input_gradient(dy())));
        let ids = || Tensor::<B, 1, Int>::from_data([6, 0, 3, 3, 1], &device);
        same(weights.each_ref().map(|weight| weight.select(ids())));
        same(weights.each_ref().map(|weight| {
            let x = x().require_grad();
            let y = weight.product(x.clone());
            x.grad(&(y * dy()).sum().backward())
                .map(Tensor::from_inner)
                .expect("x is tracked")
        }));
        same(weights.each_ref().map(|weight| weight.product(x())));
    }

    #[test]
    fn a_row_larger_than_a_part_is_a_part() {
        let weight = BaseWeight::<B, 2>::from_data(
            vec![1.0; 6],
            [2, 3],
            Some(5),
            (&Default::default(), DType::F32),
        );
        assert!(matches!(weight, BaseWeight::Split(parts) if parts.len() == 2));
    }
}
