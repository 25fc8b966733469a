//! Which way to multiply is faster on a device: measured once for each size of product, as the
//! backend's own kernels are, and remembered where CubeCL keeps such answers.

use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{
    CubeBackend, CubeRuntime, CubeTuneId, FloatElement, IntElement, element::BoolElement,
};
use cubecl::AutotuneKey;
use cubecl::ir::StorageType;
use cubecl::tune::{LocalTuner, Tunable, TunableSet, local_tuner};
use serde::{Deserialize, Serialize};

use super::super::Side;
use super::{decoded, tiled};
use crate::packed::PackedWeight;

/// Products that are alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, AutotuneKey)]
struct Product {
    /// Up to the next power of two.
    #[autotune(anchor)]
    n: usize,
    out: usize,
    r#in: usize,
    side: Side,
    double_quant: bool,
    dtype: StorageType,
}

/// `x` times a weight whose rows are whole words.
pub(super) fn faster<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
    side: Side,
) -> CubeTensor<R> {
    type Inputs<R, F, I, BT> = (CubeTensor<R>, PackedWeight<CubeBackend<R, F, I, BT>>, Side);

    static TUNER: LocalTuner<Product, CubeTuneId> = local_tuner!();

    let ways = TUNER.init(|| {
        let product = |(x, weight, side): &Inputs<R, F, I, BT>| {
            let [n, _] = x.meta.shape().dims();
            let [out, r#in] = weight.layout.shape;
            let double_quant = weight.nested.is_some();
            Product::new(n, out, r#in, *side, double_quant, x.dtype.into())
        };
        TunableSet::<Product, Inputs<R, F, I, BT>, CubeTensor<R>>::new_cloning_inputs(product)
            .with(Tunable::new(
                "tiled",
                |(x, weight, side): Inputs<R, F, I, BT>| Ok::<_, String>(tiled(x, &weight, side)),
            ))
            .with(Tunable::new(
                "decoded",
                |(x, weight, side): Inputs<R, F, I, BT>| Ok::<_, String>(decoded(x, &weight, side)),
            ))
    });
    let id = CubeTuneId::new(&x.client, &x.device);
    let client = x.client.clone();
    TUNER.execute(&id, &client, ways, (x, weight.clone(), side))
}
