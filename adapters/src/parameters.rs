//! The trained parameters of a model, by id: read out to the host and written back.
//!
//! Ids follow from names (`model::weight::param_id`), so that files can be keyed by names while
//! the walk over the model is Burn's own.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::attach::AdaptedLlama;

/// The values of all trained parameters.
pub fn read_parameters<B: Backend>(model: &AdaptedLlama<B>) -> HashMap<ParamId, Vec<f32>> {
    struct Read(HashMap<ParamId, Vec<f32>>);
    impl<B: Backend> ModuleVisitor<B> for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let data = param.val().into_data().convert::<f32>();
            self.0
                .insert(param.id, data.into_vec().expect("converted to f32"));
        }
    }
    let mut read = Read(HashMap::new());
    model.visit(&mut read);
    read.0
}

/// Overwrites the parameters that `values` has; each must have the parameter's element count.
pub fn write_parameters<B: Backend>(
    model: AdaptedLlama<B>,
    values: HashMap<ParamId, Vec<f32>>,
) -> AdaptedLlama<B> {
    struct Write(HashMap<ParamId, Vec<f32>>);
    impl<B: Backend> ModuleMapper<B> for Write {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let Some(values) = self.0.remove(&param.id) else {
                return param;
            };
            let old = param.val();
            let data = TensorData::new(values, old.dims());
            let new = Tensor::from_data(data, &old.device()).require_grad();
            Param::initialized(param.id, new)
        }
    }
    model.map(&mut Write(values))
}
