//! What is dropped is the same on every device.

#![cfg(feature = "wgpu")]

use adapters::{Dropout, DropoutBackend};
use burn::backend::{Flex, Wgpu};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive, backend::Backend};

fn values<B: Backend>(mask: FloatTensor<B>) -> Vec<f32> {
    let mask = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(mask));
    mask.into_data().to_vec().unwrap()
}

#[test]
fn a_card_drops_what_the_processor_drops() {
    for (seed, probability) in [(7, 0.1), (u64::MAX - 5, 0.5), (0x1234_5678_9abc_def0, 0.9)] {
        let dropout = Dropout { probability, seed };
        let shape = [37, 301];
        let found = <Wgpu>::dropout_mask(dropout, shape, &Default::default());
        let expected = Flex::dropout_mask(dropout, shape, &Default::default());
        assert!(
            values::<Wgpu>(found) == values::<Flex>(expected),
            "{dropout:?}"
        );
    }
}
