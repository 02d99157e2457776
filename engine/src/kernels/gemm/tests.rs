//! Products against sums in float64.

use super::*;
use crate::kernels::tests::{assert_close, random};

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
    for inputs in [1, 31, 64, 147] {
        let outputs = 50;
        let (weight, bias) = (round(random(outputs * inputs, 1)), random(outputs, 2));
        let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Bf16);
        for cpu in Cpu::available().into_iter().filter(|cpu| cpu.has_bf16()) {
            for rows in [1, 3, 12, 13, 60] {
                let x = round(random(rows * inputs, 3));
                let expected = plain(&x, &weight, &bias, inputs, None);
                let found = linear(cpu, &matrix, &x, None);
                assert_close(&found, &expected, 1e-5, &format!("{inputs} inputs, {rows} rows"));
            }
        }
    }
}

#[test]
fn int16_products_are_near_and_never_overflow() {
    for inputs in [1, 31, 130, 600, 2048] {
        let outputs = 50;
        let (weight, bias) = (random(outputs * inputs, 1), random(outputs, 2));
        // The worst case for sums: all numbers as large as they get, with one sign.
        let ones = vec![1.0; outputs * inputs];
        for (weight, tolerance) in [(weight, 3e-4), (ones, 1e-3)] {
            let matrix = Matrix::pack(&weight, Some(&bias), inputs, Precision::Int16);
            for cpu in Cpu::available().into_iter().filter(|cpu| cpu.has_int16()) {
                for rows in [1, 3, 12, 13, 60] {
                    for x in [random(rows * inputs, 3), vec![-2.5; rows * inputs]] {
                        let expected = plain(&x, &weight, &bias, inputs, None);
                        let found = linear(cpu, &matrix, &x, None);
                        let what = format!("{inputs} inputs, {rows} rows");
                        assert_close(&found, &expected, tolerance, &what);
                    }
                }
            }
        }
    }
}
