//! The weights of the network: frozen, or trained.

use burn::module::{
    AutodiffModule, Content, Devices, EmptyRecord, Module, ModuleDisplay, ModuleDisplayDefault,
    ModuleMapper, ModuleVisitor, Param, ParamId,
};
use burn::tensor::{
    DType, Tensor,
    backend::{AutodiffBackend, Backend},
};

/// A tensor of the base model.
///
/// Frozen weights are plain tensors and no parameters, so that gradients and optimizers know only
/// what is trained; `Trained` serves full fine-tuning and PEFT's `modules_to_save`.
#[derive(Debug, Clone)]
pub enum BaseWeight<B: Backend, const D: usize> {
    /// Not trained.
    Frozen(Tensor<B, D>),
    /// Trained as a whole.
    Trained(Param<Tensor<B, D>>),
}

impl<B: Backend, const D: usize> BaseWeight<B, D> {
    /// The tensor, tracked by autodiff if it is trained.
    pub fn val(&self) -> Tensor<B, D> {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trained(param) => param.val(),
        }
    }

    /// The same weight as a parameter, which is f32; `name` decides its id.
    pub fn trained(self, name: &str) -> Self {
        Self::Trained(named_param(name, self.val().cast(DType::F32)))
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
            Self::Frozen(tensor) => Self::Frozen(tensor),
            Self::Trained(param) => Self::Trained(Module::<B>::map(param, mapper)),
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
            Self::Trained(param) => Self::Trained(param.to_device(device)),
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            // A leaf again, as `Param::fork` makes one: backward adds the gradients of a tensor up
            // in the order of how far its uses are from leaves, frozen ones included.
            Self::Frozen(tensor) => Self::Frozen(tensor.to_device(device).detach()),
            Self::Trained(param) => Self::Trained(param.fork(device)),
        }
    }

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        match self {
            Self::Frozen(tensor) => Module::<B>::collect_devices(tensor, devices),
            Self::Trained(param) => param.collect_devices(devices),
        }
    }
}

impl<B: AutodiffBackend, const D: usize> AutodiffModule<B> for BaseWeight<B, D> {
    type InnerModule = BaseWeight<B::InnerBackend, D>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Frozen(tensor) => BaseWeight::Frozen(tensor.clone().inner()),
            Self::Trained(param) => BaseWeight::Trained(param.valid()),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            BaseWeight::Frozen(tensor) => Self::Frozen(Tensor::from_inner(tensor)),
            BaseWeight::Trained(param) => Self::Trained(Param::from_inner(param)),
        }
    }
}

impl<B: Backend, const D: usize> ModuleDisplayDefault for BaseWeight<B, D> {
    fn content(&self, content: Content) -> Option<Content> {
        let state = match self {
            Self::Frozen(_) => "frozen",
            Self::Trained(_) => "trained",
        };
        content.add_single(&state.to_string()).optional()
    }
}

impl<B: Backend, const D: usize> ModuleDisplay for BaseWeight<B, D> {}
