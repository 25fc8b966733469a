//! Tensors end to end.

use burn::tensor::{Tensor, backend::Backend};

/// Tensors one after the other along a dimension, with gradients that no other thread can lose.
///
/// Burn's autodiff forgets what goes into `cat` before it knows what comes out. A backward pass that
/// ends in another thread at that moment clears away what nobody holds: the steps that led here
/// (`float_cat` and `GraphCleaner` of burn-autodiff 0.21). Here the inputs outlive their successor.
pub fn cat<B: Backend, const D: usize>(tensors: Vec<Tensor<B, D>>, dim: usize) -> Tensor<B, D> {
    let joined = Tensor::cat(tensors.clone(), dim);
    drop(tensors);
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};

    /// How many of the gradients that lead through a `cat` are lost.
    fn lost(times: usize) -> usize {
        type B = Autodiff<Flex>;
        let weight = Tensor::<B, 2>::ones([2, 3], &Default::default()).require_grad();
        weight.clone().sum().backward(); // from here on autodiff no longer keeps it by itself
        let gradient = || {
            let part = || weight.clone().transpose() * 2.0;
            let mut gradients = cat(vec![part(), part()], 0).sum().backward();
            weight.grad_remove(&mut gradients)
        };
        (0..times).filter(|_| gradient().is_none()).count()
    }

    #[test]
    fn threads_do_not_lose_the_gradients_of_others() {
        let lost: usize = std::thread::scope(|scope| {
            let threads = [(); 6].map(|()| scope.spawn(|| lost(15_000)));
            threads.map(|thread| thread.join().unwrap()).iter().sum()
        });
        assert_eq!(lost, 0);
    }
}
