//! Matrix products with packed matrices.
//!
//! A [`Matrix`] stands in panels of [`WIDTH`] columns: per panel, one cache line for every input
//! (bfloat16 and int16: for every two). A tile of up to 12 rows times a few panels stays in registers while
//! the inner dimension passes by once; what follows the product (bias, GELU, sum) happens before
//! it is stored. Each element is one sum in the order of the inner dimension, so results do not
//! depend on how rows and columns are cut into tiles and tasks.
#![expect(unsafe_code, reason = "pointers into panels, and instructions for pairs")]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod pairs;
#[cfg(test)]
mod tests;
mod tile;

use std::{
    ops::{Deref, Range},
    sync::Arc,
};

use memmap2::Mmap;
use rayon::prelude::*;

use super::{
    Cpu, Precision,
    scratch::{Line, Lines, WIDTH},
};
#[cfg(target_arch = "x86_64")]
pub(super) use amx::Amx;
#[cfg(target_arch = "x86_64")]
use pairs::{Bf16, Int16};
#[cfg(target_arch = "x86_64")]
use tile::Product;
pub(super) use tile::{Finish, Panels, Rows, prefetch, product};
use tile::{Target, multiply};

/// A weight matrix, packed for `y = x W^T + b`.
#[derive(Debug)]
pub(crate) struct Matrix {
    inputs: usize,
    outputs: usize,
    lines: Store,
    /// Padded to whole panels.
    bias: Vec<f32>,
    /// Of int16: what one unit of each column is worth; padded likewise.
    scales: Vec<f32>,
    precision: Precision,
}

/// A matrix's panels.
#[derive(Debug)]
enum Store {
    Own(Vec<Line>),
    /// Bytes of a file.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Deref for Store {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        match self {
            Self::Own(lines) => lines,
            Self::Mapped(map, range) => bytemuck::cast_slice(&map[range.clone()]),
        }
    }
}

impl Matrix {
    /// Changes with what [`Self::pack`] makes: files of another layout are of no use.
    pub(crate) const LAYOUT: u32 = 1;

    /// Packs `weight`, `[outputs, inputs]`, and `bias`, `[outputs]`, on all threads.
    pub(crate) fn pack(
        weight: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
        precision: Precision,
    ) -> Self {
        let outputs = weight.len() / inputs.max(1);
        let steps = steps(inputs, precision);
        let mut lines = vec![Line::default(); outputs.div_ceil(WIDTH) * steps];
        let mut scales = vec![0.0; outputs.next_multiple_of(WIDTH)];
        let panels = lines.par_chunks_mut(steps.max(1)).zip(scales.par_chunks_mut(WIDTH));
        panels.enumerate().for_each(|(panel, (lines, scales))| {
            let mut units = Lines::floats(steps);
            let units = &mut units.as_floats()[..steps];
            let rows = weight.chunks_exact(inputs).skip(panel * WIDTH).take(WIDTH);
            for (column, row) in rows.enumerate() {
                scales[column] = write_units(precision, row, units);
                for (line, unit) in lines.iter_mut().zip(&*units) {
                    line.0[column] = *unit;
                }
            }
        });
        let (lines, bias) = (Store::Own(lines), padded_bias(bias, outputs));
        Self { inputs, outputs, lines, bias, scales, precision }
    }

    /// A matrix of float32, `[outputs, inputs]`, whose panels are there, without a bias.
    pub(super) fn of_panels(lines: Vec<Line>, inputs: usize, outputs: usize) -> Self {
        assert_eq!(lines.len(), outputs.div_ceil(WIDTH) * inputs, "not the panels of this matrix");
        let (lines, bias) = (Store::Own(lines), padded_bias(None, outputs));
        Self { inputs, outputs, lines, bias, scales: Vec::new(), precision: Precision::F32 }
    }

    /// Panels and scales, as [`Self::mapped`] takes them.
    pub(crate) fn parts(&self) -> (&[u8], &[u8]) {
        (bytemuck::cast_slice(&self.lines), bytemuck::cast_slice(&self.scales))
    }

    /// The same matrix, whose panels are the bytes of a map.
    pub(crate) fn moved(self, map: Mmap) -> Self {
        assert_eq!(map.len(), size_of_val::<[Line]>(&self.lines), "not the panels of this matrix");
        let range = 0..map.len();
        Self { lines: Store::Mapped(Arc::new(map), range), ..self }
    }

    /// A matrix, `[outputs, inputs]`, whose parts are bytes of a file; `None` if they do not fit.
    pub(crate) fn mapped(
        map: &Arc<Mmap>,
        lines: Range<usize>,
        scales: Range<usize>,
        bias: Option<&[f32]>,
        [outputs, inputs]: [usize; 2],
        precision: Precision,
    ) -> Option<Self> {
        let panels = bytemuck::try_cast_slice::<u8, Line>(map.get(lines.clone())?).ok()?;
        let scales = bytemuck::try_cast_slice::<u8, f32>(map.get(scales)?).ok()?.to_vec();
        let has_room = panels.len() == outputs.div_ceil(WIDTH) * steps(inputs, precision)
            && scales.len() == outputs.next_multiple_of(WIDTH);
        let lines = Store::Mapped(Arc::clone(map), lines);
        let bias = padded_bias(bias, outputs);
        has_room.then_some(Self { inputs, outputs, lines, bias, scales, precision })
    }

    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    fn panels(&self) -> usize {
        self.outputs.div_ceil(WIDTH)
    }

    /// Lines of a panel.
    fn steps(&self) -> usize {
        steps(self.inputs, self.precision)
    }

    /// All columns, as an operand.
    fn operand(&self) -> Panels<'_> {
        Panels { lines: &self.lines, steps: self.steps(), columns: self.outputs }
    }

    /// `out = finish(x W^T + b)` for a block of rows, on this thread.
    pub(super) fn block(
        &self,
        cpu: Cpu,
        x: Rows<'_>,
        finish: &Finish<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let out = Target::new(out, stride, x.count, self.outputs);
        let (mut lines, mut scales) = self.room(x);
        let x = self.left(cpu, x, &mut lines, &mut scales);
        self.columns(cpu, x, 0..self.panels(), finish, &out);
    }

    /// Room for the rows of a left operand in this precision, and for their scales.
    fn room(&self, x: Rows<'_>) -> (Lines, Lines) {
        match self.precision {
            Precision::F32 => (Lines::new(0), Lines::new(0)),
            Precision::Bf16 => (Lines::floats(x.count * padded(self.steps())), Lines::new(0)),
            Precision::Int16 => {
                (Lines::floats(x.count * padded(self.steps())), Lines::floats(x.count))
            }
        }
    }

    /// Rows of floats as this precision multiplies them.
    fn left<'a>(
        &self,
        cpu: Cpu,
        x: Rows<'a>,
        lines: &'a mut Lines,
        scales: &'a mut Lines,
    ) -> Left<'a> {
        assert!(x.step == 1 || self.precision == Precision::F32, "rows of pairs are contiguous");
        match self.precision {
            Precision::F32 => Left { rows: x, scales: None },
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => {
                let unit = Bf16::new(cpu).expect("packed as bfloat16 only where the CPU has it");
                let rows = unit.round_rows(x, self.inputs, lines);
                Left { rows, scales: None }
            }
            #[cfg(target_arch = "x86_64")]
            Precision::Int16 => {
                let unit = Int16::new(cpu).expect("packed as int16 only where the CPU has it");
                let scales = &mut scales.as_floats()[..x.count];
                let rows = unit.quantize_rows(x, self.inputs, lines, scales);
                Left { rows, scales: Some(scales) }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => {
                let _ = (cpu, lines, scales);
                unreachable!("packed in these precisions only where the CPU has them")
            }
        }
    }

    /// As [`Self::block`], for some panels only; other threads may write the other columns.
    fn columns(
        &self,
        cpu: Cpu,
        x: Left<'_>,
        panels: Range<usize>,
        finish: &Finish<'_>,
        out: &Target<'_>,
    ) {
        let scales = x.scales.map(|rows| (rows, self.scales.as_slice()));
        let finish = Finish { bias: Some(&self.bias), scales, ..*finish };
        let (x, b) = (x.rows, self.operand());
        match self.precision {
            Precision::F32 => multiply(cpu, x, self.inputs, b, panels, &finish, out),
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => {
                let unit = Bf16::new(cpu).expect("packed as bfloat16 only where the CPU has it");
                let product = Product { x, b, panels, finish: &finish, out, arithmetic: unit };
                // SAFETY: `unit` proves that the processor has the instructions.
                unsafe { unit.multiply(product) }
            }
            #[cfg(target_arch = "x86_64")]
            Precision::Int16 => {
                let unit = Int16::new(cpu).expect("packed as int16 only where the CPU has it");
                let product = Product { x, b, panels, finish: &finish, out, arithmetic: unit };
                match amx::for_rows(cpu, x.count) {
                    // SAFETY: `tiles` proves the instructions.
                    Some(tiles) => unsafe { tiles.multiply(&product) },
                    // SAFETY: `unit` does.
                    None => unsafe { unit.multiply(product) },
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("packed in these precisions only where the CPU has them"),
        }
    }
}

/// The left operand of a product in its matrix's precision.
#[derive(Clone, Copy)]
struct Left<'a> {
    rows: Rows<'a>,
    /// Of int16: what a unit of each row is worth.
    scales: Option<&'a [f32]>,
}

fn padded_bias(bias: Option<&[f32]>, outputs: usize) -> Vec<f32> {
    let mut padded = bias.unwrap_or_default().to_vec();
    padded.resize(outputs.next_multiple_of(WIDTH), 0.0);
    padded
}

/// Lines of a panel.
fn steps(inputs: usize, precision: Precision) -> usize {
    inputs.div_ceil(values_of_a_line(precision))
}

/// Inputs that one line of a panel holds of every column.
fn values_of_a_line(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 1,
        Precision::Bf16 | Precision::Int16 => 2,
    }
}

/// Lines (pairs of inputs) whose int16 products are summed as int32 before they become float32.
const INT16_STEPS: usize = 64;
/// Largest Euclidean length of a block in int16, and largest number.
const BLOCK_LENGTH: f32 = 45_800.0;
const LARGEST: f32 = 32_700.0;

/// What one unit of a row of int16 is worth, so that no sum of products of [`INT16_STEPS`] lines
/// can overflow: the largest number is 32767, and no block's Euclidean length is above the square
/// root of 2^31 (Cauchy and Schwarz then bound the sum), with a hundredth to spare for rounding.
#[inline(always)]
fn int16_scale(row: &[f32]) -> f32 {
    let mut most = f32::MIN_POSITIVE;
    for block in row.chunks(2 * INT16_STEPS) {
        let squares: f32 = block.iter().map(|x| x * x).sum();
        let largest = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        most = most.max(squares.sqrt() / BLOCK_LENGTH).max(largest / LARGEST);
    }
    most
}

/// A row's numbers as a panel holds them, [`values_of_a_line`] in each; returns what a unit is worth.
fn write_units(precision: Precision, row: &[f32], units: &mut [f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Int16
        && let Some(unit) = Int16::new(Cpu::detect())
    {
        return pairs::quantize(unit, row, units);
    }
    let scale = if precision == Precision::Int16 { int16_scale(row) } else { 1.0 };
    for (unit, part) in units.iter_mut().zip(row.chunks(values_of_a_line(precision))) {
        *unit = match precision {
            Precision::F32 => part[0],
            Precision::Bf16 => round_pair(part),
            Precision::Int16 => quantize_pair(part, scale.recip()),
        };
    }
    scale
}

/// Two floats in units of a scale's inverse, as int16, in the bits of one float.
fn quantize_pair(pair: &[f32], inverse: f32) -> f32 {
    /// Adding it rounds to an integer, whose two's complement then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let quantize = |x: f32| (x * inverse + ROUND).to_bits() & 0xffff;
    f32::from_bits(quantize(pair[0]) | pair.get(1).map_or(0, |x| quantize(*x) << 16))
}

/// Two floats, rounded to the nearest bfloat16, in the bits of one.
fn round_pair(pair: &[f32]) -> f32 {
    let round = |x: f32| {
        let bits = x.to_bits();
        bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
    };
    f32::from_bits(round(pair[0]) | pair.get(1).map_or(0, |x| round(*x) << 16))
}

/// Whether a CPU has the instructions for products of a precision.
pub(super) fn can_multiply(cpu: Cpu, precision: Precision) -> bool {
    match precision {
        Precision::F32 => true,
        #[cfg(target_arch = "x86_64")]
        Precision::Bf16 => Bf16::new(cpu).is_some(),
        #[cfg(target_arch = "x86_64")]
        Precision::Int16 => Int16::new(cpu).is_some(),
        #[cfg(not(target_arch = "x86_64"))]
        _ => {
            let _ = cpu;
            false
        }
    }
}

/// `finish(x W^T + b)` for rows of `inputs` floats, on all threads.
pub(crate) fn linear(cpu: Cpu, matrix: &Matrix, x: &[f32], add: Option<&[f32]>) -> Vec<f32> {
    let fresh = || vec![0.0; x.len() / matrix.inputs.max(1) * matrix.outputs];
    let mut out = add.map_or_else(fresh, <[f32]>::to_vec);
    let finish = Finish { onto: add.is_some(), ..Finish::default() };
    linear_into(cpu, matrix, x, finish, &mut out);
    out
}

/// As [`linear`], for results that are only looked at: they stand in a buffer of this thread.
pub(crate) fn linear_lent<R>(
    cpu: Cpu,
    matrix: &Matrix,
    x: &[f32],
    look: impl FnOnce(&[f32]) -> R,
) -> R {
    let length = x.len() / matrix.inputs.max(1) * matrix.outputs;
    let mut out = Lines::floats(length);
    let out = &mut out.as_floats()[..length];
    linear_into(cpu, matrix, x, Finish::default(), out);
    look(out)
}

/// Up to so many rows, tasks are ranges of columns: the weights are read once, by all threads.
pub(super) const FEW_ROWS: usize = 48;

/// As [`linear`], for tight rows in and out.
pub(super) fn linear_into(
    cpu: Cpu,
    matrix: &Matrix,
    x: &[f32],
    finish: Finish<'_>,
    out: &mut [f32],
) {
    let (inputs, outputs) = (matrix.inputs, matrix.outputs);
    let rows = x.len() / inputs.max(1);
    if rows > FEW_ROWS {
        let block = block_rows(rows);
        out.par_chunks_mut(block * outputs).enumerate().for_each(|(i, out)| {
            let first = i * block;
            let count = out.len() / outputs;
            let tight = Rows::new(&x[first * inputs..], inputs, count);
            let mut copy = Lines::new(0);
            // Pairs are a copy in any case.
            let is_f32 = matrix.precision == Precision::F32;
            let x = if is_f32 { spread(tight, &mut copy) } else { tight };
            matrix.block(cpu, x, &finish, out, outputs);
        });
        return;
    }
    let target = Target::new(out, outputs, rows, outputs);
    let x = Rows::new(x, inputs, rows);
    let (mut lines, mut scales) = matrix.room(x);
    let x = matrix.left(cpu, x, &mut lines, &mut scales);
    let panels = matrix.panels();
    // Whole groups of panels, a few tasks for each thread, none of them tiny.
    let task = panels.div_ceil(4 * rayon::current_num_threads()).max(4).next_multiple_of(4);
    (0..panels.div_ceil(task)).into_par_iter().for_each(|i| {
        let range = i * task..panels.min((i + 1) * task);
        matrix.columns(cpu, x, range, &finish, &target);
    });
}

/// Tight rows at another distance: at a large power of two they would share few sets of the cache.
fn spread<'a>(x: Rows<'_>, out: &'a mut Lines) -> Rows<'a> {
    let (size, stride) = (x.stride, padded(x.stride));
    *out = Lines::floats(x.count * stride);
    for (to, from) in out.as_floats().chunks_mut(stride).zip(x.data.chunks(size).take(x.count)) {
        to[..size].copy_from_slice(from);
    }
    Rows::new(out.as_floats(), stride, x.count)
}

/// A distance between rows of so many floats that spreads them over the sets of the cache.
pub(super) fn padded(size: usize) -> usize {
    size.next_multiple_of(WIDTH) + WIDTH
}

/// Rows of a task, so that all threads have several and each fits the cache.
pub(super) fn block_rows(rows: usize) -> usize {
    rows.div_ceil(2 * rayon::current_num_threads()).clamp(12, 192)
}
