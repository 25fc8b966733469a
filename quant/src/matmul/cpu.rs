//! The product on [`Flex`]: the weight is decoded in tiles that stay in the cache, each multiplied
//! as soon as it is there; for one row, codes and `x` meet in registers.

use std::cell::Cell;
use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};
use rayon::prelude::*;

use super::Side;
use crate::PackedWeight;
use crate::decode::{AbsmaxView, View};

/// Most rows and columns of a tile: 4 MiB of f32, which stay in the last level of cache. `x` is
/// packed anew for each tile, so smaller ones cost more than they spare.
const TILE: [usize; 2] = [1024, 1024];
/// How many values a task decodes at least.
const TASK_VALUES: usize = 1 << 15;

thread_local! {
    /// The tile of the thread that asked for a product.
    static BUFFER: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// See [`super::QuantBackend::quant_matmul`]; `x` is f32.
pub(super) fn matmul(x: FlexTensor, weight: &PackedWeight<Flex>, side: Side) -> FlexTensor {
    let [n, columns] = x.layout().shape().dims();
    let [wanted, new_columns] = side.columns(weight.layout.shape);
    assert_eq!(
        columns, wanted,
        "columns of x for a weight {:?}",
        weight.layout
    );
    let x = x.to_contiguous();
    let x: &[f32] = x.as_slice().expect("a contiguous tensor of 32-bit floats");
    let parts = Parts::of(weight);
    let view = parts.view(weight);
    let y = match (n, side) {
        (1, Side::Transposed) => one_row(x, &view),
        _ => by_tiles(x, n, &view, side),
    };
    let layout = Layout::contiguous(Shape::from([n, new_columns]));
    FlexTensor::new(Bytes::from_elems(y), layout, DType::F32)
}

/// A weight's tensors as Flex holds them.
struct Parts {
    codes: FlexTensor,
    absmax: FlexTensor,
    code_book: FlexTensor,
    nested: Option<[FlexTensor; 2]>,
}

impl Parts {
    fn of(weight: &PackedWeight<Flex>) -> Self {
        Self {
            codes: weight.codes.clone().into_primitive(),
            absmax: weight.absmax.clone().into_primitive().tensor(),
            code_book: weight.code_book.clone().into_primitive().tensor(),
            nested: weight.nested.as_ref().map(|nested| {
                [
                    nested.codes.clone().into_primitive(),
                    nested.code_book.clone().into_primitive().tensor(),
                ]
            }),
        }
    }

    fn view<'a>(&'a self, weight: &PackedWeight<Flex>) -> View<'a> {
        let offset = weight.nested.as_ref().map_or(0.0, |nested| nested.offset);
        let code_book = self.code_book.storage::<f32>();
        View {
            shape: weight.layout.shape,
            block_size: weight.layout.scheme.block_size,
            code_book: code_book.try_into().expect("sixteen values"),
            precision: weight.layout.precision,
            codes: bytemuck::cast_slice(self.codes.storage::<u32>()),
            absmax: match &self.nested {
                None => AbsmaxView::Plain(self.absmax.storage()),
                Some([codes, code_book]) => AbsmaxView::Double {
                    codes: bytemuck::cast_slice(codes.storage::<u32>()),
                    absmax: self.absmax.storage(),
                    code_book: code_book.storage(),
                    offset,
                },
            },
        }
    }
}

/// `x` `[in]` to `[out]`: reads each code once and writes no value.
fn one_row(x: &[f32], view: &View) -> Vec<f32> {
    let [out, r#in] = view.shape;
    let rows = TASK_VALUES.div_ceil(r#in); // of a task
    let mut y = vec![0.0; out];
    let x = view.operand(x);
    let fill = |(task, y): (usize, &mut [f32])| view.dot_rows(task * rows, &x, y);
    match y.len() <= rows {
        true => fill((0, &mut y)), // no detour through the thread pool
        false => y.par_chunks_mut(rows).enumerate().for_each(fill),
    }
    y
}

/// `x` `[n, columns]` to `[n, new columns]`.
fn by_tiles(x: &[f32], n: usize, view: &View, side: Side) -> Vec<f32> {
    let [columns, new_columns] = side.columns(view.shape);
    assert_eq!(x.len(), n * columns);
    let mut y = Vec::with_capacity(n * new_columns);
    if n == 0 {
        return y;
    }
    let mut values = BUFFER.take(); // a product within this one, by a stolen task, gets its own
    for tile in tiles(view.shape) {
        decode_tile(view, &tile, &mut values);
        let width = tile.columns.len() as isize;
        let (from, to, row_stride, column_stride) = match side {
            Side::Transposed => (&tile.columns, &tile.rows, 1, width),
            Side::Plain => (&tile.rows, &tile.columns, width, 1),
        };
        // SAFETY: the tile lies inside of the weight, so `from` are columns of `x` and `to`
        // those of `y`, which has room for them. Old values of `y` are read from the second
        // tile on that adds to them; the tiles come in that order.
        unsafe {
            gemm::gemm(
                n,
                to.len(),
                from.len(),
                y.as_mut_ptr().add(to.start),
                1,
                new_columns as isize,
                from.start > 0,
                x.as_ptr().add(from.start),
                1,
                columns as isize,
                values.as_ptr(),
                column_stride,
                row_stride,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    }
    BUFFER.set(values);
    // SAFETY: the tiles cover every column.
    unsafe { y.set_len(n * new_columns) };
    y
}

/// Rows and columns of the weight.
struct Tile {
    rows: Range<usize>,
    columns: Range<usize>,
}

/// The tiles of a weight; any two in one row or column come in ascending order.
fn tiles(shape: [usize; 2]) -> Vec<Tile> {
    // Equal parts: a narrow rest would cost as much as a whole tile.
    let length = |d: usize| shape[d].div_ceil(shape[d].div_ceil(TILE[d]));
    let cuts = |d: usize| {
        let length = length(d);
        let starts = (0..shape[d]).step_by(length);
        starts.map(move |start| start..(start + length).min(shape[d]))
    };
    let tile = |rows: Range<usize>| {
        cuts(1).map(move |columns| Tile {
            rows: rows.clone(),
            columns,
        })
    };
    cuts(0).flat_map(tile).collect()
}

/// Fills `values` with a tile, row by row.
fn decode_tile(view: &View, tile: &Tile, values: &mut Vec<f32>) {
    let [_, r#in] = view.shape;
    let width = tile.columns.len();
    values.resize(tile.rows.len() * width, 0.0);
    let rows = TASK_VALUES.div_ceil(width); // of a task
    let tasks = values.par_chunks_mut(rows * width).enumerate();
    tasks.for_each(|(task, values)| {
        for (i, values) in values.chunks_mut(width).enumerate() {
            let row = tile.rows.start + task * rows + i;
            view.decode(row * r#in + tile.columns.start, values);
        }
    });
}
