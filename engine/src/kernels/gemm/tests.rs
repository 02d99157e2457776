//! Products against sums in float64.

use std::time::{Duration, Instant};

use super::*;
use crate::kernels::tests::{assert_close, cpus_with, random};
#[cfg(target_arch = "x86_64")]
use crate::{kernels::Level, not_run};

/// `finish(x W^T + b)`, element by element, in float64.
fn plain(x: &[f32], weight: &[f32], bias: &[f32], inputs: usize, add: Option<&[f32]>) -> Vec<f32> {
    let outputs = bias.len();
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
    };
    let mut out = Vec::new();
    for (r, x) in x.chunks_exact(inputs).enumerate() {
        for (c, w) in weight.chunks_exact(inputs).enumerate() {
            let add = add.map_or(0.0, |add| f64::from(add[r * outputs + c]));
            #[expect(clippy::cast_possible_truncation, reason = "the result's type")]
            out.push((dot(x, w) + f64::from(bias[c]) + add) as f32);
        }
    }
    out
}

#[test]
fn products_are_right_for_every_number_of_rows_on_every_instruction_set() {
    for (inputs, outputs) in [(1, 1), (7, 16), (33, 50), (64, 147)] {
        let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::F32);
        for rows in (1..=50).chain([97, 200]) {
            let (x, add) = (random(rows * inputs, 3), random(rows * outputs, 4));
            let expected = plain(&x, &weight, &bias, inputs, Some(&add));
            for cpu in Cpu::available() {
                let found = linear(cpu, &matrix, &x, Some(&add));
                assert_close(&found, &expected, 1e-5, &format!("{} {rows}", cpu.name()));
            }
        }
    }
}

#[test]
fn a_rows_result_does_not_depend_on_the_other_rows() {
    let (inputs, outputs) = (96, 80);
    let matrix = Matrix::pack(&random(outputs * inputs, 1), None, inputs, Precision::F32);
    let x = random(120 * inputs, 2);
    for cpu in Cpu::available() {
        let all = linear(cpu, &matrix, &x, None);
        for rows in [1, 2, 5, 13, 48, 49] {
            let some = linear(cpu, &matrix, &x[..rows * inputs], None);
            assert_eq!(some, all[..rows * outputs], "{} {rows} rows", cpu.name());
        }
    }
}

#[test]
fn bfloat16_products_equal_those_of_rounded_operands() {
    let round = |values: Vec<f32>| -> Vec<f32> {
        let round = |x: f32| f32::from_bits(round_pair(&[x]).to_bits() << 16);
        values.into_iter().map(round).collect()
    };
    let cpus = cpus_with("products of bfloat16", Cpu::has_bf16);
    for inputs in [1, 31, 64, 147] {
        let outputs = 50;
        let (weight, bias) = (round(random(outputs * inputs, 1)), random(outputs, 2));
        let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Bf16);
        for cpu in &cpus {
            for rows in [1, 3, 12, 13, 60] {
                let x = round(random(rows * inputs, 3));
                let expected = plain(&x, &weight, &bias, inputs, None);
                let found = linear(*cpu, &matrix, &x, None);
                assert_close(&found, &expected, 1e-5, &format!("{inputs} inputs, {rows} rows"));
            }
        }
    }
}

#[test]
fn int16_products_are_near_and_never_overflow() {
    let cpus = cpus_with("products of int16", Cpu::has_int16);
    for inputs in [1, 31, 130, 600, 2048] {
        let outputs = 50;
        let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        // The worst case for sums: all numbers as large as they get, with one sign.
        let ones = vec![1.0; outputs * inputs];
        for (weight, tolerance) in [(weight, 3e-4), (ones, 1e-3)] {
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Int16);
            for cpu in &cpus {
                for rows in (1..=27).chain([60, 200]) {
                    for x in [random(rows * inputs, 3), vec![-2.5; rows * inputs]] {
                        let expected = plain(&x, &weight, &bias, inputs, None);
                        let found = linear(*cpu, &matrix, &x, None);
                        let what = format!("{} {inputs} inputs, {rows} rows", cpu.name());
                        assert_close(&found, &expected, tolerance, &what);
                    }
                }
            }
        }
    }
}

/// Sums that leave the registers make int16 two and a half times as slow as float32: a compiler has
/// done that.
#[test]
fn int16_products_take_about_as_long_as_those_of_float32_at_most() {
    let (rows, inputs, outputs) = (96, 256, 256);
    let (weight, x) = (random(outputs * inputs, 1), random(rows * inputs, 2));
    let pack = |precision| Matrix::pack(&weight, None, inputs, precision);
    let matrices = [Precision::F32, Precision::Int16].map(pack);
    let mut out = vec![0.0; rows * outputs];
    for cpu in cpus_with("products of int16", Cpu::has_int16) {
        let mut least = [Duration::MAX; 2];
        for _ in 0..200 {
            for (matrix, least) in matrices.iter().zip(&mut least) {
                let start = Instant::now();
                let x = Rows::new(&x, inputs, rows);
                matrix.block(cpu, x, &Finish::default(), &mut out, outputs);
                *least = start.elapsed().min(*least);
            }
        }
        let [float32, int16] = least;
        assert!(int16 < 3 * float32 / 2, "{}: {int16:?} beside {float32:?}", cpu.name());
    }
}

/// The numbers that a row of inputs, or a column of weights, has become as int8.
fn as_int8(row: &[f32], is_weights: bool) -> Vec<f32> {
    let largest = row.iter().fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let lowest = row.iter().copied().fold(f32::INFINITY, f32::min);
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (unit, zero) = if is_weights {
        (largest / 127.0, 0.0)
    } else {
        (((highest - lowest) / 255.0).max(f32::MIN_POSITIVE), lowest)
    };
    let inverse = unit.recip();
    let whole = |x: f32| if is_weights { x / unit } else { (x - zero) * inverse };
    row.iter().map(|x| whole(*x).round_ties_even() * unit + zero).collect()
}

#[test]
fn int8_products_equal_those_of_rounded_operands_and_are_near() {
    let cpus = cpus_with("products of int8", Cpu::has_int8);
    for inputs in [1, 3, 31, 130, 600, 4096] {
        let outputs = 50;
        let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        // The worst case for sums: all numbers as large as they get, with one sign.
        for weight in [weight, vec![1.0; outputs * inputs]] {
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Int8);
            let rounded: Vec<f32> =
                weight.chunks(inputs).flat_map(|row| as_int8(row, true)).collect();
            for rows in [1, 3, 4, 5, 12, 13, 60] {
                let mut ends = vec![-2.5; rows * inputs];
                ends.iter_mut().step_by(7).for_each(|x| *x = 0.5);
                for x in [random(rows * inputs, 3), ends, vec![-2.5; rows * inputs]] {
                    let of_rounded: Vec<f32> =
                        x.chunks(inputs).flat_map(|row| as_int8(row, false)).collect();
                    let add = random(rows * outputs, 4);
                    let expected = plain(&of_rounded, &rounded, &bias, inputs, Some(&add));
                    let far = plain(&x, &weight, &bias, inputs, Some(&add));
                    for cpu in &cpus {
                        let found = linear(*cpu, &matrix, &x, Some(&add));
                        let what = format!("{}: {inputs} inputs, {rows} rows", cpu.name());
                        assert_close(&found, &expected, 2e-5, &what);
                        assert_close(&found, &far, 2e-2, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn int8_products_are_the_same_on_every_instruction_set() {
    let cpus = cpus_with("products of int8", Cpu::has_int8);
    let (inputs, outputs, rows) = (300, 70, 29);
    let matrix = Matrix::pack(&random(outputs * inputs, 1), None, inputs, Precision::Int8);
    let x = random(rows * inputs, 2);
    let results: Vec<_> = cpus.iter().map(|cpu| linear(*cpu, &matrix, &x, None)).collect();
    for (cpu, found) in cpus.iter().zip(&results) {
        assert_close(found, &results[0], 1e-6, cpu.name());
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn tiles_give_the_bits_that_vnni_gives() {
    let Some(tiles) = Amx::emulated() else {
        return not_run("AMX, emulated or not, needs AVX512-VNNI and AVX512-VBMI");
    };
    for inputs in [1, 31, 64, 128, 130, 147, 600] {
        let outputs = 50;
        let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        for weight in [weight, vec![-1.0; outputs * inputs]] {
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Int16);
            for rows in [15, 16, 17, 40, 60] {
                let add = random(rows * outputs, 4);
                for x in [random(rows * inputs, 3), vec![2.5; rows * inputs]] {
                    let [expected, found] = [Level::Avx512(tiles.simd()), Level::Amx(tiles)]
                        .map(|level| linear(Cpu(level), &matrix, &x, Some(&add)));
                    assert_eq!(found, expected, "{inputs} inputs, {rows} rows");
                }
            }
        }
    }
}
