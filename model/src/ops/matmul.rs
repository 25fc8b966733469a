//! The matrix product.

mod one_row;

use std::sync::atomic::{AtomicBool, Ordering};

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{Tensor, backend::Backend};

use super::{cpu, primitive, tensor};

/// `a` `[.., m, k]` times `b` `[.., k, n]`: `[.., m, n]`.
///
/// Burn's fusion makes one kernel of a product and the element-wise operations that follow it, and
/// autotune may give that kernel a routine that reads `b` in the wrong order and returns wrong
/// numbers: if `m` or `n` is 1, and for sizes that its tiles do not divide. See
/// <https://github.com/tracel-ai/cubek/pull/262>, <https://github.com/tracel-ai/burn/issues/5122>.
/// Here a product has a kernel of its own, which is right, and so have those of its gradients.
pub fn matmul<B: MatmulBackend, const D: usize>(a: Tensor<B, D>, b: Tensor<B, D>) -> Tensor<B, D> {
    tensor(B::product(primitive(a), primitive(b)))
}

/// `x` `[m, k]` times a weight `[k, n]`, computed in the type of the weight: `[m, n]` in that of `x`.
pub fn weight_matmul<B: MatmulBackend>(x: Tensor<B, 2>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = x.dtype();
    matmul(x.cast(weight.dtype()), weight).cast(dtype)
}

/// `sum` `[m, n]` plus `a` `[m, k]` times `b` `[k, n]`: `[m, n]`.
pub fn add_matmul<B: MatmulBackend>(
    sum: Tensor<B, 2>,
    a: Tensor<B, 2>,
    b: Tensor<B, 2>,
) -> Tensor<B, 2> {
    tensor(B::add_matmul(primitive(sum), primitive(a), primitive(b)))
}

/// The operation on a backend's own tensors.
pub trait MatmulBackend: Backend {
    /// See [`matmul`].
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(a, b)
    }

    /// The most bytes of a tensor that the device takes, where that is less than its memory.
    fn largest_tensor(_device: &Self::Device) -> Option<u64> {
        None
    }

    /// Runs what consists of many small products.
    fn together<T: Send>(run: impl FnOnce() -> T + Send) -> T {
        run()
    }

    /// Runs two things about `rows` rows that need nothing of each other.
    fn join<T: Send, U: Send>(
        _rows: usize,
        first: impl FnOnce() -> T + Send,
        second: impl FnOnce() -> U + Send,
    ) -> (T, U) {
        (first(), second())
    }

    /// See [`add_matmul`].
    fn add_matmul(
        sum: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        reference::<Self>(sum, a, b)
    }
}

/// [`MatmulBackend::add_matmul`] in plain tensor operations.
pub fn reference<B: MatmulBackend>(
    sum: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
) -> FloatTensor<B> {
    let (sum, a, b): (Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 2>) =
        (tensor(sum), tensor(a), tensor(b));
    primitive(sum + matmul(a, b))
}

/// Products smaller than this are computed by one thread, as Burn's are.
const ALONE: usize = 192 * 192 * 192;

impl MatmulBackend for Flex {
    /// Burn's own fills its output with zeros and then copies that to where it is aligned: twice the
    /// memory and two passes over it, for numbers that nobody reads.
    fn product(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        let is_matrix = |x: &FlexTensor| x.layout().shape().num_dims() == 2;
        if !(cpu::all_f32([&a, &b]) && is_matrix(&a) && is_matrix(&b)) {
            return Flex::float_matmul(a, b);
        }
        if let Some(y) = one_row::product(&a, &b) {
            return y;
        }
        let ([m, k], [inner, n]) = (cpu::dims(&a), cpu::dims(&b));
        assert_eq!(k, inner, "columns of a and rows of b");
        if m * n * k == 0 {
            return cpu::from_vec(vec![0.0; m * n], [m, n]);
        }
        let (a, b) = (strided(a), strided(b));
        let mut y = Vec::with_capacity(m * n);
        // SAFETY: `y` has room for `m * n` numbers, and the product writes them all.
        unsafe {
            multiply(&a, &b, y.as_mut_ptr(), false);
            y.set_len(m * n);
        }
        cpu::from_vec(y, [m, n])
    }

    /// On a thread of the pool, whose others stay awake meanwhile: waking them for each product would
    /// take longer than a small one does.
    fn together<T: Send>(run: impl FnOnce() -> T + Send) -> T {
        let is_over = &AtomicBool::new(false);
        rayon::scope(|scope| {
            let runner = rayon::current_thread_index();
            scope.spawn_broadcast(move |_, thread| {
                let is_other = Some(thread.index()) != runner;
                while is_other && !is_over.load(Ordering::Acquire) {
                    if rayon::yield_now() != Some(rayon::Yield::Executed) {
                        std::hint::spin_loop();
                    }
                }
            });
            let _end = OnDrop(|| is_over.store(true, Ordering::Release)); // also if `run` panics
            run()
        })
    }

    /// One row side by side; more of them keep all cores busy by themselves.
    fn join<T: Send, U: Send>(
        rows: usize,
        first: impl FnOnce() -> T + Send,
        second: impl FnOnce() -> U + Send,
    ) -> (T, U) {
        match rows {
            1 => rayon::join(first, second),
            _ => (first(), second()),
        }
    }

    /// In place where nobody else holds `sum`.
    fn add_matmul(sum: FlexTensor, a: FlexTensor, b: FlexTensor) -> FlexTensor {
        let sum = match one_row::add(sum, &a, &b) {
            Ok(sum) => return sum,
            Err(sum) => sum,
        };
        if !cpu::all_f32([&sum, &a, &b]) {
            return reference::<Flex>(sum, a, b);
        }
        let ([m, n], [_, k]) = (cpu::dims(&sum), cpu::dims(&a));
        assert_eq!([cpu::dims(&a), cpu::dims(&b)], [[m, k], [k, n]]);
        if m * n * k == 0 {
            return sum;
        }
        let (a, b) = (strided(a), strided(b));
        let [sum] = cpu::update([sum], [m * n], |_, [sum]| {
            // SAFETY: `sum` has `m * n` numbers and, being borrowed mutably, is neither operand.
            unsafe { multiply(&a, &b, sum.as_mut_ptr(), true) };
        });
        sum
    }
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

/// Writes the product of `a` `[m, k]` and `b` `[k, n]`, neither of them empty, to `to` `[m, n]`, or
/// adds it to what is there.
///
/// # Safety
/// `to` must be valid for writing `m * n` numbers, and for reading them if the product is added; none
/// of them may be one of an operand's.
unsafe fn multiply(a: &FlexTensor, b: &FlexTensor, to: *mut f32, adds: bool) {
    let ([m, k], [_, n]) = (cpu::dims(a), cpu::dims(b));
    let [(a, a_strides), (b, b_strides)] = [a, b].map(elements);
    let threads = match m * n * k < ALONE {
        true => gemm::Parallelism::None,
        false => gemm::Parallelism::Rayon(0), // all there are
    };
    // SAFETY: `elements` has checked that every element of `a` and `b` is inside its slice; the rest
    // is the caller's.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to,
            1,
            n as isize,
            adds,
            a.as_ptr(),
            a_strides[1],
            a_strides[0],
            b.as_ptr(),
            b_strides[1],
            b_strides[0],
            1.0,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

#[derive(Debug)]
struct ProductBackward;

/// The operands that the other one's gradient needs.
type ProductState = [Option<NodeId>; 2];

impl<B: MatmulBackend> Backward<B, 2> for ProductBackward {
    type State = ProductState;

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let ([a, b], [a_node, b_node]) = (ops.state, ops.parents);
        let dy = grads.consume::<B>(&ops.node); // [.., m, n]
        if let (Some(node), Some(b)) = (a_node, b) {
            let b = B::float_transpose(checkpointer.retrieve_node_output(b));
            grads.register::<B>(node.id, B::product(dy.clone(), b));
        }
        if let (Some(node), Some(a)) = (b_node, a) {
            // `b` is mostly a weight turned round: so turned, its gradient lies as the weight does,
            // and adding it to others takes no copy.
            let a = checkpointer.retrieve_node_output(a);
            let turned = B::product(B::float_transpose(dy), a); // [.., n, k]
            grads.register::<B>(node.id, B::float_transpose(turned));
        }
    }
}

impl<B: MatmulBackend, C: CheckpointStrategy> MatmulBackend for Autodiff<B, C> {
    fn largest_tensor(device: &B::Device) -> Option<u64> {
        B::largest_tensor(device)
    }

    fn together<T: Send>(run: impl FnOnce() -> T + Send) -> T {
        B::together(run)
    }

    /// The batch dimensions of both operands are the same.
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let y = B::product(a.primitive.clone(), b.primitive.clone());
        match ProductBackward
            .prepare::<C>([a.node.clone(), b.node.clone()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let kept_a = b.is_tracked().then(|| prep.checkpoint(&a));
                let kept_b = a.is_tracked().then(|| prep.checkpoint(&b));
                prep.finish([kept_a, kept_b], y)
            }
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// Copies only a matrix that [`elements`] cannot stand for.
fn strided(x: FlexTensor) -> FlexTensor {
    match x.layout().strides().iter().all(|stride| *stride >= 0) {
        true => x,
        false => x.to_contiguous(),
    }
}

/// The elements of a matrix from its first one on, and its strides.
fn elements(x: &FlexTensor) -> (&[f32], [isize; 2]) {
    let (layout, [rows, columns]) = (x.layout(), cpu::dims(x));
    let [row, column] = [0, 1].map(|d| layout.strides()[d]);
    let elements = &x.storage()[layout.start_offset()..];
    assert!((rows - 1) * row as usize + (columns - 1) * (column as usize) < elements.len());
    (elements, [row, column])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{assert_near, assert_repeats, noise, values};

    #[test]
    fn fused_equals_reference() {
        for (m, k, n) in [(1, 16, 576), (300, 16, 700), (16, 300, 700), (5, 1, 3)] {
            let case = format!("{m}, {k}, {n}");
            let sum = noise([m, n], 1.0, 1);
            for (a, b) in [
                (noise([m, k], 1.0, 2), noise([k, n], 1.0, 3)),
                (
                    noise([k, m], 1.0, 2).transpose(0, 1),
                    noise([n, k], 1.0, 3).transpose(0, 1),
                ),
            ] {
                let expected = reference::<Flex>(sum.clone(), a.clone(), b.clone());
                let found = Flex::add_matmul(sum.clone(), a, b);
                assert_near(&found, &expected, 1e-6, &case);
            }
        }
    }

    #[test]
    fn products_equal_those_of_burn() {
        for (m, k, n) in [(1, 16, 576), (300, 16, 700), (300, 300, 700), (1, 1, 1)] {
            let turned = |shape: [usize; 2], seed| noise(shape, 1.0, seed).transpose(0, 1);
            for (a, b) in [
                (noise([m, k], 1.0, 2), noise([k, n], 1.0, 3)),
                (turned([k, m], 2), turned([n, k], 3)),
            ] {
                let expected = Flex::float_matmul(a.clone(), b.clone());
                let found = Flex::product(a, b);
                assert_eq!(values(&found), values(&expected), "{m}, {k}, {n}");
            }
        }
        let part = noise([9, 5], 1.0, 1).narrow(0, 2, 4); // that does not begin at the beginning
        let b = noise([5, 3], 1.0, 2);
        let expected = Flex::float_matmul(part.clone(), b.clone());
        assert_eq!(values(&Flex::product(part, b)), values(&expected));
        let nothing = |shape| cpu::from_vec(Vec::new(), shape);
        let empty = Flex::product(nothing([0, 5]), noise([5, 3], 1.0, 2));
        assert_eq!(cpu::dims(&empty), [0, 3]);
        let zeros = Flex::product(nothing([2, 0]), nothing([0, 3]));
        assert_eq!(values(&zeros), [0.0; 6]);
    }

    #[test]
    fn a_sum_that_nobody_else_holds_is_added_to_in_place() {
        let (a, b) = (noise([6, 4], 1.0, 2), noise([4, 9], 1.0, 3));
        let sum = noise([6, 9], 1.0, 1);
        let address = |x: &FlexTensor| x.bytes().as_ptr();
        let (before, shared) = (address(&sum), sum.clone());
        let copied = Flex::add_matmul(sum, a.clone(), b.clone());
        assert_ne!(address(&copied), before);
        let in_place = Flex::add_matmul(shared, a, b);
        assert_eq!(address(&in_place), before);
        assert_near(&in_place, &copied, 0.0, "the same product");
    }

    #[test]
    fn sums_repeat_bit_by_bit() {
        let (sum, a, b) = (
            noise([300, 700], 1.0, 1),
            noise([300, 64], 1.0, 2),
            noise([64, 700], 1.0, 3),
        );
        assert_repeats(|| vec![Flex::add_matmul(sum.clone(), a.clone(), b.clone())]);
    }

    #[test]
    fn runs_at_the_same_time_end_each_with_its_own_numbers() {
        let (a, b) = (noise([1, 600], 1.0, 1), noise([700, 600], 1.0, 2));
        let product = || values(&Flex::product(a.clone(), b.transpose(0, 1)));
        let expected = product();
        let twice = || Flex::join(1, product, product);
        std::thread::scope(|scope| {
            let run = || (0..20).for_each(|_| assert_eq!(Flex::together(twice).1, expected));
            (0..3).for_each(|_| drop(scope.spawn(run)));
        });
    }

    #[test]
    fn a_run_that_panics_lets_the_threads_go() {
        let run = || Flex::together(|| std::panic::resume_unwind(Box::new("over")));
        let caught: Result<(), _> = std::panic::catch_unwind(run);
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"over"));
        assert_eq!(Flex::together(|| 3), 3);
    }
}
