//! Products in float32 whose rows do not depend on each other.

mod common;

use common::{assert_near, dot, in_both_orders, input, int, made, output, unwritten, values};
use florence_cuda::{Arg, geometry};

fn product(x: &[f32], weight: &[f32], rows: usize, inputs: usize, kernel: &str) -> Vec<f32> {
    let outputs = weight.len() / inputs;
    in_both_orders::<f32, _>(|run| {
        let mut out = unwritten::<f32>(rows * outputs);
        let args =
            [input(x), input(weight), output(&mut out), Arg::Size(rows), int(inputs), int(outputs)];
        let launch = match kernel {
            "product" => geometry::product(rows, outputs),
            _ => geometry::product_few(rows, outputs),
        };
        run(kernel, launch, &args);
        out
    })
}

#[test]
fn products_are_the_formula_and_both_kernels_give_the_same_bits() {
    for (rows, inputs, outputs) in
        [(1, 32, 96), (3, 4, 1), (70, 152, 130), (65, 36, 17), (33, 768, 65), (128, 64, 128)]
    {
        let (x, weight) = (made::<f32>(1, rows * inputs), made::<f32>(2, outputs * inputs));
        let out = product(&x, &weight, rows, inputs, "product");
        let lines = |of: &[f32]| -> Vec<Vec<f64>> { of.chunks(inputs).map(values).collect() };
        let (left, right) = (lines(&x), lines(&weight));
        let exact = left.iter().flat_map(|a| right.iter().map(|b| dot(a, b)));
        assert_near(&out, &exact.collect::<Vec<_>>(), 1e-5);
        assert_eq!(out, product(&x, &weight, rows, inputs, "product_few"));
    }
}

#[test]
fn a_row_is_multiplied_alone_as_in_company() {
    let (rows, inputs, outputs) = (131, 100, 70);
    let (x, weight) = (made::<f32>(1, rows * inputs), made::<f32>(2, outputs * inputs));
    let all = product(&x, &weight, rows, inputs, "product");
    for row in [0, 1, 63, 64, 130] {
        let alone = product(&x[row * inputs..][..inputs], &weight, 1, inputs, "product_few");
        assert_eq!(alone, all[row * outputs..][..outputs], "row {row}");
    }
}
