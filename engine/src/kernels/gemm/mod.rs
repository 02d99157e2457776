//! Matrix products with packed matrices.
//!
//! A [`Matrix`] stands in panels of [`WIDTH`] columns: per panel, one cache line for every input
//! (bfloat16 and int16: for every two; int8: for every four). A tile of up to 12 rows times a few
//! panels stays in registers while the inner dimension passes by once; what follows the product
//! (bias, GELU, sum) happens before it is stored. Each element is one sum in the order of the inner
//! dimension, so results do not depend on how rows and columns are cut into tiles and tasks.
//!
//! - `tile`: the loops; `finish`: what becomes of their sums
//! - `unit`, `amx`: instructions for numbers other than float32
//! - `quantize`: floats as whole numbers
//! - `trial`: a matrix in two kinds of numbers, of which one is chosen at run time
#![expect(unsafe_code, reason = "pointers into panels, and instructions for pairs")]

#[cfg(target_arch = "x86_64")]
mod amx;
mod finish;
mod quantize;
#[cfg(test)]
mod tests;
mod tile;
mod trial;
#[cfg(target_arch = "x86_64")]
mod unit;

use std::{
    mem::MaybeUninit,
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
pub(super) use finish::{Finish, Then};
use finish::{Target, unwritten};
use quantize::{Int8Rows, Int16Rows};
use tile::{Interleave, Product};
pub(super) use tile::{Panels, Rows, prefetch, prefetch_later, product};
use trial::Other;
pub(crate) use trial::Switch;
#[cfg(target_arch = "x86_64")]
use unit::{Bf16, Int8, Int16, round_rows};

/// A weight matrix, packed for `y = x W^T + b`.
#[derive(Debug)]
pub(crate) struct Matrix {
    inputs: usize,
    outputs: usize,
    lines: Store,
    /// Padded to whole panels.
    bias: Vec<f32>,
    /// Of whole numbers: what one unit of each column is worth; padded likewise. Of int8 then also
    /// each column's sum.
    scales: Vec<f32>,
    precision: Precision,
    /// While both are tried.
    other: Option<Box<Other>>,
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
        let panels = lines.par_chunks_mut(steps.max(1)).enumerate().map(|(panel, lines)| {
            let mut units = Lines::floats(steps);
            let units = &mut units.as_floats()[..steps];
            let rows = weight.chunks_exact(inputs).skip(panel * WIDTH).take(WIDTH);
            let mut scales = [Scale::default(); WIDTH];
            for ((column, row), scale) in rows.enumerate().zip(&mut scales) {
                *scale = write_units(precision, row, units);
                for (line, unit) in lines.iter_mut().zip(&*units) {
                    line.0[column] = *unit;
                }
            }
            scales
        });
        let scales: Vec<[Scale; WIDTH]> = panels.collect();
        let units = scales.as_flattened().iter().map(|scale| scale.unit);
        let sums = scales.as_flattened().iter().map(|scale| scale.sum);
        let scales =
            if has_sums(precision) { units.chain(sums).collect() } else { units.collect() };
        let (lines, bias) = (Store::Own(lines), padded_bias(bias, outputs));
        Self { inputs, outputs, lines, bias, scales, precision, other: None }
    }

    /// A matrix of float32, `[outputs, inputs]`, whose panels are there, without a bias.
    pub(super) fn of_panels(lines: Vec<Line>, inputs: usize, outputs: usize) -> Self {
        assert_eq!(lines.len(), outputs.div_ceil(WIDTH) * inputs, "not the panels of this matrix");
        let (lines, bias) = (Store::Own(lines), padded_bias(None, outputs));
        let (scales, precision) = (Vec::new(), Precision::F32);
        Self { inputs, outputs, lines, bias, scales, precision, other: None }
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
            && scales.len() == scales_of_columns(outputs, precision);
        let lines = Store::Mapped(Arc::clone(map), lines);
        let bias = padded_bias(bias, outputs);
        let other = None;
        has_room.then_some(Self { inputs, outputs, lines, bias, scales, precision, other })
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
        self.block_into(cpu, x, finish, &Target::new(out, stride, x.count, self.outputs));
    }

    fn block_into(&self, cpu: Cpu, x: Rows<'_>, finish: &Finish<'_>, out: &Target<'_>) {
        let (matrix, _clock) = self.chosen(|| 1);
        let (mut lines, mut scales) = matrix.room(cpu, x);
        let x = matrix.left(cpu, x, &mut lines, &mut scales);
        matrix.columns(cpu, x, 0..self.panels(), finish, out);
    }

    /// Room for the rows of a left operand in this precision, and for what is known of each.
    fn room(&self, cpu: Cpu, x: Rows<'_>) -> (Lines, Lines) {
        if self.precision == Precision::F32 {
            return (Lines::new(0), Lines::new(0));
        }
        let apart = x.count * padded(self.steps());
        let interleaved = if self.takes_rows_apart(cpu, x.count) {
            0
        } else {
            Interleave::length(x.count, self.steps())
        };
        (Lines::floats(apart + interleaved), Lines::floats(2 * x.count))
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
        let (inputs, steps, stride) = (self.inputs, self.steps(), padded(self.steps()));
        if self.precision == Precision::F32 {
            return Left { rows: x, units: None, zeros: None };
        }
        let (out, interleaved) = lines.as_floats().split_at_mut(x.count * stride);
        let (units, zeros) = scales.as_floats().split_at_mut(x.count);
        match self.precision {
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => round_rows(Bf16::new(cpu).expect(PACKED), x, inputs, out),
            Precision::Int16 => cpu.run(Int16Rows { x, inputs, out, units }),
            Precision::Int8 => cpu.run(Int8Rows { x, inputs, out, units, zeros }),
            _ => unreachable!("{PACKED}"),
        }
        let mut rows = Rows::new(out, stride, x.count);
        if !self.takes_rows_apart(cpu, x.count) {
            cpu.run(Interleave { x: rows, steps, out: interleaved });
            rows = Rows::new(interleaved, steps, x.count);
        }
        let is_whole = matches!(self.precision, Precision::Int16 | Precision::Int8);
        let zeros = has_sums(self.precision).then_some(&*zeros);
        Left { rows, units: is_whole.then_some(&*units), zeros }
    }

    /// Whether AMX multiplies so many rows, whose tiles are loaded row by row.
    fn takes_rows_apart(&self, cpu: Cpu, rows: usize) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.precision == Precision::Int16 && amx::for_rows(cpu, rows).is_some();
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (cpu, rows);
            false
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
        let columns = self.outputs.next_multiple_of(WIDTH);
        // float32 needs none.
        let (units, sums) = self.scales.split_at_checked(columns).unwrap_or_default();
        let (units, zeros) = (x.units.map(|rows| (rows, units)), x.zeros.map(|rows| (rows, sums)));
        let finish = &Finish { bias: Some(&self.bias), units, zeros, ..*finish };
        let product = Product { x: x.rows, b: self.operand(), panels, finish, out };
        match self.precision {
            Precision::F32 => product.multiply(cpu),
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => Bf16::new(cpu).expect(PACKED).multiply(&product),
            #[cfg(target_arch = "x86_64")]
            Precision::Int16 => match amx::for_rows(cpu, x.rows.count) {
                // SAFETY: `tiles` proves the instructions.
                Some(tiles) => unsafe { tiles.multiply(&product) },
                None => Int16::new(cpu).expect(PACKED).multiply(&product),
            },
            #[cfg(target_arch = "x86_64")]
            Precision::Int8 => Int8::new(cpu).expect(PACKED).multiply(&product),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("{PACKED}"),
        }
    }
}

const PACKED: &str = "packed in these numbers only where the CPU multiplies them";

/// The left operand of a product in its matrix's precision.
#[derive(Clone, Copy)]
struct Left<'a> {
    rows: Rows<'a>,
    /// Of whole numbers: what a unit of each row is worth.
    units: Option<&'a [f32]>,
    /// Of int8: what 0 is worth in each row.
    zeros: Option<&'a [f32]>,
}

/// What is known of a column of whole numbers.
#[derive(Debug, Clone, Copy, Default)]
struct Scale {
    /// What one unit is worth.
    unit: f32,
    /// What the column's sum is worth.
    sum: f32,
}

/// Whether rows of the left operand have a zero of their own, so that columns' sums count.
fn has_sums(precision: Precision) -> bool {
    precision == Precision::Int8
}

fn scales_of_columns(outputs: usize, precision: Precision) -> usize {
    outputs.next_multiple_of(WIDTH) * if has_sums(precision) { 2 } else { 1 }
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
        Precision::Int8 => 4,
    }
}

/// A row's numbers as a panel holds them, [`values_of_a_line`] in each.
fn write_units(precision: Precision, row: &[f32], units: &mut [f32]) -> Scale {
    match precision {
        Precision::F32 => units.copy_from_slice(row),
        Precision::Bf16 => {
            for (unit, pair) in units.iter_mut().zip(row.chunks(2)) {
                *unit = round_pair(pair);
            }
        }
        Precision::Int16 => {
            let (inputs, mut unit) = (row.len(), [0.0]);
            let x = Rows::new(row, inputs, 1);
            Cpu::detect().run(Int16Rows { x, inputs, out: units, units: &mut unit });
            return Scale { unit: unit[0], sum: 0.0 };
        }
        Precision::Int8 => {
            let (unit, sum) = quantize::int8(row, units);
            return Scale { unit, sum };
        }
    }
    Scale { unit: 1.0, sum: 0.0 }
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
        #[cfg(target_arch = "x86_64")]
        Precision::Int8 => Int8::new(cpu).is_some(),
        #[cfg(not(target_arch = "x86_64"))]
        _ => {
            let _ = cpu;
            false
        }
    }
}

/// `x W^T + b` for rows of `inputs` floats, and `add` if there is one, on all threads.
pub(crate) fn linear(cpu: Cpu, matrix: &Matrix, x: &[f32], add: Option<&[f32]>) -> Vec<f32> {
    let length = x.len() / matrix.inputs.max(1) * matrix.outputs;
    let then = if add.is_some() { Then::Add } else { Then::Store };
    let finish = Finish { then, ..Finish::default() };
    // Clearing it first would cost a twentieth of the encoder.
    let mut out = Vec::with_capacity(length);
    linear_unwritten(cpu, matrix, x, finish, add, &mut out.spare_capacity_mut()[..length]);
    // SAFETY: every element of every row has been written.
    unsafe { out.set_len(length) };
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
    linear_unwritten(cpu, matrix, x, finish, None, unwritten(out));
}

/// As [`linear_into`]; what is to be added stands in `add`, or in its place.
fn linear_unwritten(
    cpu: Cpu,
    matrix: &Matrix,
    x: &[f32],
    finish: Finish<'_>,
    add: Option<&[f32]>,
    out: &mut [MaybeUninit<f32>],
) {
    let (inputs, outputs) = (matrix.inputs, matrix.outputs);
    let rows = x.len() / inputs.max(1);
    if rows > FEW_ROWS {
        let block = block_rows(rows);
        out.par_chunks_mut(block * outputs).enumerate().for_each(|(i, out)| {
            let first = i * block;
            let count = out.len() / outputs;
            if let Some(add) = add {
                out.write_copy_of_slice(&add[first * outputs..][..count * outputs]);
            }
            let tight = Rows::new(&x[first * inputs..], inputs, count);
            let mut copy = Lines::new(0);
            // Pairs are a copy in any case.
            let is_f32 = matrix.precision == Precision::F32;
            let x = if is_f32 { spread(tight, &mut copy) } else { tight };
            matrix.block_into(cpu, x, &finish, &Target::unwritten(out, outputs, count, outputs));
        });
        return;
    }
    if let Some(add) = add {
        out.write_copy_of_slice(add);
    }
    let (matrix, _clock) = matrix.chosen(rayon::current_num_threads);
    let target = Target::unwritten(out, outputs, rows, outputs);
    let x = Rows::new(x, inputs, rows);
    let (mut lines, mut scales) = matrix.room(cpu, x);
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
    rows.div_ceil(2 * rayon::current_num_threads()).clamp(12, 96)
}
