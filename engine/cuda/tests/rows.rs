//! Kernels on rows: bias, GELU, sums, layer normalisation, embeddings.

mod common;

use common::{
    Number, Run, assert_near, in_both_orders, index, input, int, made, maybe, output, unwritten,
    values,
};
use florence_cuda::{Arg, geometry};
use half::{bf16, f16};

const SHAPES: [(usize, usize); 6] = [(1, 32), (3, 96), (257, 128), (33, 256), (3, 1024), (257, 8)];

/// By its series, of which all terms are positive.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp()
}

fn gelu<T: Number>(x: &[T], bias: &[f32]) -> Vec<T> {
    let (rows, size) = (x.len() / bias.len(), bias.len());
    in_both_orders::<T, _>(|run| {
        let mut x = x.to_vec();
        let args = [output(&mut x), input(bias), Arg::Size(rows), int(size)];
        run("bias_gelu", geometry::bias_gelu(rows, size), &args);
        x
    })
}

fn gelu_is_exact<T: Number>() {
    for (rows, size) in SHAPES {
        let x: Vec<T> = made::<f32>(1, rows * size).iter().map(|x| T::round(x * 8.0)).collect();
        let bias = made::<f32>(2, size);
        let exact: Vec<f64> = (0..rows * size)
            .map(|i| x[i].value() + bias[i % size].value())
            .map(|x| 0.5 * x * (1.0 + erf(x / 2.0f64.sqrt())))
            .collect();
        assert_near(&gelu(&x, &bias), &exact, 1e-6);
    }
}

#[test]
fn bias_gelu_is_the_exact_gelu() {
    gelu_is_exact::<f32>();
    gelu_is_exact::<bf16>();
}

fn sums<T: Number>() {
    for (rows, size) in SHAPES {
        let product = made::<T>(1, rows * size);
        let (bias, residual) = (made::<f32>(2, size), made::<f32>(3, rows * size));
        let geometry = geometry::bias_residual(rows, size);
        let of = |i: usize| product[i].value() + bias[i % size].value();
        let out = in_both_orders::<T, _>(|run| {
            let mut out = unwritten::<f32>(rows * size);
            let args = [
                input(&product),
                input(&bias),
                input(&residual),
                output(&mut out),
                Arg::Size(rows),
                int(size),
            ];
            run("bias_residual", geometry, &args);
            out
        });
        let exact: Vec<f64> = (0..rows * size).map(|i| of(i) + residual[i].value()).collect();
        assert_near(&out, &exact, 1e-6);
        let out = in_both_orders::<T, _>(|run| {
            let mut out = unwritten::<T>(rows * size);
            let args =
                [input(&product), input(&bias), output(&mut out), Arg::Size(rows), int(size)];
            run("add_bias", geometry::add_bias(rows, size), &args);
            out
        });
        let exact: Vec<f64> = (0..rows * size).map(of).collect();
        assert_near(&out, &exact, 1e-6);
    }
}

#[test]
fn bias_and_residual_are_added() {
    sums::<f32>();
    sums::<bf16>();
}

/// The operands of a norm that may be there or not.
#[derive(Clone, Copy)]
struct Summands<'a, T> {
    x: Option<&'a [f32]>,
    product: Option<&'a [T]>,
    bias: Option<&'a [f32]>,
}

/// Sum, norm, and norm as `T`.
type Norm<T> = (Vec<f32>, Vec<f32>, Vec<T>);

fn layer_norm<T: Number>(
    run: Run<'_>,
    summands: Summands<'_, T>,
    [weight, shift]: [&[f32]; 2],
    rows: usize,
) -> Norm<T> {
    let size = weight.len();
    let mut out = (unwritten(rows * size), unwritten(rows * size), unwritten(rows * size));
    let args = [
        maybe(summands.x),
        maybe(summands.product),
        maybe(summands.bias),
        input(weight),
        input(shift),
        output(&mut out.0),
        output(&mut out.1),
        output(&mut out.2),
        int(rows),
        int(size),
    ];
    run("layer_norm", geometry::layer_norm(rows, size), &args);
    out
}

fn norms<T: Number>(rows: usize, size: usize, parts: [bool; 3]) {
    // Far from zero: a variance from the squares' mean would be wrong.
    let x: Vec<f32> = made::<f32>(1, rows * size).iter().map(|x| x * 0.5 + 300.0).collect();
    let product = made::<T>(2, rows * size);
    let (bias, weight, shift) = (made::<f32>(3, size), made::<f32>(4, size), made::<f32>(5, size));
    let summands = Summands {
        x: parts[0].then_some(x.as_slice()),
        product: parts[1].then_some(product.as_slice()),
        bias: parts[2].then_some(bias.as_slice()),
    };
    let (sum, out, out_t) =
        in_both_orders::<T, _>(|run| layer_norm(run, summands, [&weight, &shift], rows));
    let part = |has: bool, x: f64| if has { x } else { 0.0 };
    let exact: Vec<f64> = (0..rows * size)
        .map(|i| {
            part(parts[0], x[i].value())
                + part(parts[1], product[i].value())
                + part(parts[2], bias[i % size].value())
        })
        .collect();
    assert_near(&sum, &exact, 1e-7);
    // The norm is of the sums as they are stored.
    let normed: Vec<f64> = sum
        .chunks(size)
        .flat_map(|row| {
            let row = values(row);
            let mean = row.iter().sum::<f64>() / size as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / size as f64;
            let scale = 1.0 / (variance + 1e-5).sqrt();
            let of =
                |(i, x): (usize, &f64)| (x - mean) * scale * weight[i].value() + shift[i].value();
            row.iter().enumerate().map(of).collect::<Vec<_>>()
        })
        .collect();
    // A float at 300 has steps of 3e-5.
    let tolerance = if parts[0] { 2e-4 } else { 2e-6 };
    assert_near(&out, &normed, tolerance);
    assert_near(&out_t, &normed, tolerance);
}

#[test]
fn layer_norm_sums_what_is_there() {
    for (rows, size) in
        [(1, 32), (3, 96), (257, 128), (5, 512), (3, 768), (33, 1024), (2, 4096), (9, 8)]
    {
        for parts in [[true; 3], [true, false, false], [false, true, true], [false, true, false]] {
            norms::<f32>(rows, size, parts);
            norms::<bf16>(rows, size, parts);
        }
    }
}

#[test]
fn layer_norm_writes_only_what_is_asked_for() {
    let (rows, size) = (3, 128);
    let (x, weight) = (made::<f32>(1, rows * size), made::<f32>(2, size));
    let none = Arg::Pointer(std::ptr::null());
    let whole = Summands::<f32> { x: Some(&x), product: None, bias: None };
    let (_, expected, _) =
        in_both_orders::<f32, _>(|run| layer_norm(run, whole, [&weight, &weight], rows));
    let out = in_both_orders::<f32, _>(|run| {
        let mut out = unwritten::<f32>(rows * size);
        let (weight, args) = (input(&weight), [int(rows), int(size)]);
        let args =
            [input(&x), none, none, weight, weight, none, output(&mut out), none, args[0], args[1]];
        run("layer_norm", geometry::layer_norm(rows, size), &args);
        out
    });
    assert_eq!(out, expected);
}

#[test]
fn a_row_is_normalised_alone_as_in_company() {
    for size in [96, 256, 1024] {
        let (x, weight) = (made::<f32>(1, 7 * size), made::<f32>(2, size));
        let norm = |x: &[f32]| {
            let summands = Summands::<bf16> { x: Some(x), product: None, bias: None };
            let rows = x.len() / size;
            in_both_orders::<bf16, _>(|run| layer_norm(run, summands, [&weight, &weight], rows)).1
        };
        let all = norm(&x);
        for row in [0, 3, 6] {
            let at = row * size..(row + 1) * size;
            assert_eq!(norm(&x[at.clone()]), all[at]);
        }
    }
}

fn embeddings<E: Number>() {
    let (words, places, d) = (51, 9, 96);
    let (table, positions) = (made::<E>(1, words * d), made::<f32>(2, places * d));
    let ids = [50, 0, 7, 7, 49];
    let at = [0, 8, 3, 4, 8];
    let out = in_both_orders::<E, _>(|run| {
        let mut out = unwritten::<f32>(ids.len() * d);
        let args = [
            input(&table),
            input(&positions),
            input(&ids),
            input(&at),
            output(&mut out),
            int(ids.len()),
            int(d),
        ];
        run("embed", geometry::embed(ids.len(), d), &args);
        out
    });
    let rows = ids
        .iter()
        .zip(at)
        .flat_map(|(id, at)| (0..d).map(move |i| (index(*id) * d + i, index(at) * d + i)));
    let exact: Vec<f64> =
        rows.map(|(word, place)| table[word].value() + positions[place].value()).collect();
    assert_near(&out, &exact, 1e-7);
}

#[test]
fn embeddings_are_words_and_positions() {
    embeddings::<f32>();
    embeddings::<f16>();
    embeddings::<bf16>();
}

#[test]
fn half_floats_are_read_exactly() {
    let table: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let zeros = vec![0.0f32; table.len()];
    let out = in_both_orders::<f16, _>(|run| {
        let mut out = unwritten::<f32>(table.len());
        let (first, count) = ([0], int(table.len()));
        let args = [
            input(&table),
            input(&zeros),
            input(&first),
            input(&first),
            output(&mut out),
            int(1),
            count,
        ];
        run("embed", geometry::embed(1, table.len()), &args);
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    });
    for (x, bits) in table.iter().zip(out) {
        // Minus zero plus zero is zero.
        let (exact, got) = (x.to_f32() + 0.0, f32::from_bits(bits));
        assert!(
            exact.to_bits() == bits || (exact.is_nan() && got.is_nan()),
            "{got} is not {exact}"
        );
    }
}

#[test]
fn floats_are_rounded_to_the_nearest_bfloat16() {
    // All that begin with these bits, so that every tail and every tie is there; then infinities.
    let bits = [0x3f80u32, 0x3f81, 0xc2fe, 0x7f7f, 0x0000, 0x807f].into_iter();
    let mut x: Vec<f32> = bits
        .flat_map(|high| (0..=0xffff).map(move |low| f32::from_bits(high << 16 | low)))
        .collect();
    x.extend([f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, 2.0, 3.0, 4.0]);
    let out = in_both_orders::<bf16, _>(|run| {
        let mut out = unwritten::<bf16>(x.len());
        // A patch of one element is the element.
        let count = int(x.len());
        let args =
            [input(&x), output(&mut out), int(1), int(1), int(1), count, int(1), int(1), int(0)];
        run("patches", geometry::patches(1, geometry::patch_length(x.len(), 1)), &args);
        out
    });
    assert!(x.iter().zip(out).all(|(x, out)| bf16::from_f32(*x).to_bits() == out.to_bits()));
}
