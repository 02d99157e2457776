//! The kernels at the sizes of Florence-2 base, for `benches/kernels.rs`.

use std::hint::black_box;

use pulp::{Simd, WithSimd};

use super::{
    ChannelAttention, Cpu, Matrix, Mlp, Norm, PatchConv, Precision, SequenceKeys, WindowAttention,
    attend_sequence, depthwise_residual, gemm::can_multiply, layer_norm, linear,
};

/// A kernel with its input, ready to run.
pub struct Case {
    /// Kernel and size.
    pub name: String,
    /// Multiplications and additions of a run.
    pub flops: u64,
    /// Bytes of weights that a run reads.
    pub weight_bytes: u64,
    /// Runs it once, on the threads of the current rayon pool.
    pub run: Box<dyn Fn() + Send + Sync>,
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 7919 % 1000) as f32 / 1000.0 - 0.5).collect()
}

fn norm(size: usize) -> Norm {
    Norm { weight: vec![1.0; size], bias: vec![0.0; size] }
}

/// What a CPU can multiply weights in; of AMX only what it does otherwise than AVX-512.
pub fn precisions(cpu: Cpu) -> impl Iterator<Item = &'static str> {
    let is_its_own =
        move |precision: &Precision| cpu.name() != "amx" || *precision == Precision::Int16;
    let can = move |precision: &Precision| can_multiply(cpu, *precision);
    ALL.into_iter().filter(can).filter(is_its_own).map(Precision::name)
}

const ALL: [Precision; 4] = [Precision::F32, Precision::Int16, Precision::Int8, Precision::Bf16];

/// All kernels on an instruction set, with products of weights in one of its [`precisions`].
pub fn cases(cpu: Cpu, precision: &str) -> Vec<Case> {
    let precision = ALL.into_iter().find(|known| known.name() == precision).unwrap_or_default();
    let matrix = |inputs: usize, outputs: usize| {
        Matrix::pack(&numbers(inputs * outputs), Some(&numbers(outputs)), inputs, precision)
    };
    let weight_bytes = match precision {
        Precision::F32 => 4,
        Precision::Bf16 | Precision::Int16 => 2,
        Precision::Int8 => 1,
    };
    let mut cases = Vec::new();
    let mut case =
        |name: String, flops: usize, weights: usize, run: Box<dyn Fn() + Send + Sync>| {
            let (flops, weight_bytes) = (flops as u64, (weights * weight_bytes) as u64);
            cases.push(Case { name, flops, weight_bytes, run });
        };

    for (rows, inputs, outputs) in
        [(36864, 128, 512), (2304, 512, 2048), (577, 768, 3072), (48, 768, 3072), (3, 768, 51328)]
    {
        let (weights, x) = (matrix(inputs, outputs), numbers(rows * inputs));
        let run = move || drop(black_box(linear(cpu, &weights, &x, None)));
        let flops = 2 * rows * inputs * outputs;
        case(format!("linear {rows}x{inputs}x{outputs}"), flops, inputs * outputs, Box::new(run));
    }
    for (tokens, size) in [(36864, 128), (2304, 512)] {
        let (fc1, fc2) = (matrix(size, 4 * size), matrix(4 * size, size));
        let mlp = Mlp { norm: Some(norm(size)), fc1, fc2 };
        let x = numbers(tokens * size);
        let run = move || mlp.forward(cpu, &mut black_box(x.clone()));
        case(
            format!("mlp {tokens}x{size}"),
            16 * tokens * size * size,
            8 * size * size,
            Box::new(run),
        );

        let side = if size == 128 { 192 } else { 48 };
        let grid = (1, side, side, size);
        let (heads, window) = (size / 32, 12);
        let (qkv, proj) = (matrix(size, 3 * size), matrix(size, size));
        let op = WindowAttention { norm: norm(size), qkv, proj, heads, window };
        let x = numbers(tokens * size);
        let run = move || op.forward(cpu, &mut black_box(x.clone()), grid);
        let flops = 8 * tokens * size * size + 4 * tokens * 144 * size;
        case(format!("window attention {tokens}x{size}"), flops, 4 * size * size, Box::new(run));

        let (qkv, proj) = (matrix(size, 3 * size), matrix(size, size));
        let op = ChannelAttention { norm: norm(size), qkv, proj, groups: heads };
        let x = numbers(tokens * size);
        let run = move || op.forward(cpu, &mut black_box(x.clone()), tokens);
        let flops = 8 * tokens * size * size + 4 * tokens * 32 * size;
        case(format!("channel attention {tokens}x{size}"), flops, 4 * size * size, Box::new(run));

        let (x, taps, bias) = (numbers(tokens * size), numbers(9 * size), numbers(size));
        let run = move || depthwise_residual(cpu, &mut black_box(x.clone()), grid, &taps, &bias);
        case(format!("depthwise 3x3 {tokens}x{size}"), 19 * tokens * size, 9 * size, Box::new(run));

        let (norm, x) = (norm(size), numbers(tokens * size));
        let run = move || drop(black_box(layer_norm(cpu, &norm, &x)));
        case(format!("layer norm {tokens}x{size}"), 8 * tokens * size, 2 * size, Box::new(run));
    }
    let conv = PatchConv { matrix: matrix(147, 128), kernel: 7, stride: 4, padding: 3 };
    let x = numbers(768 * 768 * 3);
    let run = move || drop(black_box(conv.forward(cpu, &x, (1, 768, 768, 3))));
    case("patch convolution 7x7".to_owned(), 2 * 36864 * 147 * 128, 147 * 128, Box::new(run));

    let (length, d) = (585, 768);
    let (k, v) = (numbers(length * d), numbers(length * d));
    let keys = SequenceKeys::pack(&k, &v, d, 12, precision.kept());
    let q = numbers(length * d);
    let run = move || drop(black_box(attend_sequence(cpu, &q, &keys)));
    case(format!("attention {length}x{d}"), 4 * length * length * d, 0, Box::new(run));
    cases
}

/// Floating-point operations per second of one core that only multiplies and adds registers.
pub fn peak(cpu: Cpu) -> f64 {
    const ROUNDS: u32 = 4_000_000;
    let start = std::time::Instant::now();
    let lanes = cpu.run(Registers { rounds: ROUNDS });
    f64::from(ROUNDS) * 12.0 * 2.0 * lanes / start.elapsed().as_secs_f64()
}

struct Registers {
    rounds: u32,
}

impl WithSimd for Registers {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        let (x, y) = (black_box(simd.splat_f32s(0.5)), black_box(simd.splat_f32s(0.25)));
        let mut sums = [x; 12];
        for _ in 0..self.rounds {
            for sum in &mut sums {
                *sum = simd.mul_add_e_f32s(*sum, x, y);
            }
        }
        black_box(sums);
        S::F32_LANES as f64
    }
}
