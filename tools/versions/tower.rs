//! The vision tower and the encoder of base shape on one version's kernels, with made-up weights.
#![allow(dead_code, unused_imports)]

mod child;
mod kernels;

use std::time::Instant;

use kernels::{
    ChannelAttention, Cpu, Matrix, Mlp, Norm, PatchConv, Precision, SequenceKeys, WindowAttention,
    attend_sequence, depthwise_residual, layer_norm, linear,
};

pub const PARTS: [&str; 10] = [
    "patches",
    "norms",
    "depthwise",
    "windows",
    "channels",
    "perceptrons", // of the tower
    "products",
    "attention",
    "perceptrons",
    "norms", // of the encoder
];
pub const OF_THE_TOWER: usize = 6;
const D: usize = 768;

struct Stage {
    convolution: PatchConv,
    norm: Norm,
    /// Attention within windows, then across channels, each with what surrounds it.
    blocks: Vec<(Around, WindowAttention, Around, ChannelAttention)>,
}

/// Two convolutions and a perceptron.
struct Around {
    taps: [(Vec<f32>, Vec<f32>); 2],
    mlp: Mlp,
}

struct Layer {
    products: [Matrix; 4],
    mlp: Mlp,
}

pub struct Network {
    cpu: Cpu,
    kept: Precision,
    stages: Vec<Stage>,
    layers: Vec<Layer>,
    pixels: Vec<f32>,
    embeddings: Vec<f32>,
}

/// Between `-scale` and `scale`, the same every time.
fn numbers(count: usize, scale: f32) -> Vec<f32> {
    let mut state = 12345u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..count).map(|_| next()).collect()
}

fn norm(size: usize) -> Norm {
    Norm { weight: vec![1.0; size], bias: vec![0.0; size] }
}

impl Network {
    pub fn new(precision: &str) -> Self {
        let all = [Precision::F32, Precision::Bf16, Precision::Int16, Precision::Int8];
        let precision = all.into_iter().find(|known| known.name() == precision).unwrap();
        let matrix = |inputs: usize, outputs: usize| {
            let weights = numbers(inputs * outputs, (3.0 / inputs as f32).sqrt());
            Matrix::pack(&weights, Some(&numbers(outputs, 0.1)), inputs, precision)
        };
        let stage = |(from, to, kernel, stride, depth): (usize, usize, usize, usize, usize)| {
            let around = || Around {
                taps: [(); 2].map(|()| (numbers(9 * to, 0.1), numbers(to, 0.1))),
                mlp: Mlp { norm: Some(norm(to)), fc1: matrix(to, 4 * to), fc2: matrix(4 * to, to) },
            };
            let attention = || (norm(to), matrix(to, 3 * to), matrix(to, to));
            let blocks = (0..depth).map(|_| {
                let ((norm, qkv, proj), heads) = (attention(), to / 32);
                let windows = WindowAttention { norm, qkv, proj, heads, window: 12 };
                let (norm, qkv, proj) = attention();
                let channels = ChannelAttention { norm, qkv, proj, groups: heads };
                (around(), windows, around(), channels)
            });
            let matrix = matrix(kernel * kernel * from, to);
            let convolution = PatchConv { matrix, kernel, stride, padding: kernel / 2 };
            let norm = norm(if from == 3 { to } else { from });
            Stage { convolution, norm, blocks: blocks.collect() }
        };
        let shapes =
            [(3, 128, 7, 4, 1), (128, 256, 3, 2, 1), (256, 512, 3, 2, 9), (512, 1024, 3, 2, 1)];
        let layer = |_| Layer {
            products: [(); 4].map(|()| matrix(D, D)),
            mlp: Mlp { norm: None, fc1: matrix(D, 4 * D), fc2: matrix(4 * D, D) },
        };
        Self {
            cpu: Cpu::detect(),
            kept: precision.kept(),
            stages: shapes.into_iter().map(stage).collect(),
            layers: (0..6).map(layer).collect(),
            pixels: numbers(768 * 768 * 3, 2.0),
            embeddings: numbers(589 * D, 1.0),
        }
    }

    /// Milliseconds of each part, and what comes out of the tower and of the encoder.
    pub fn run(&self) -> ([f64; PARTS.len()], [Vec<f32>; 2]) {
        let mut times = [0.0; PARTS.len()];
        let mut start = Instant::now();
        let mut add = |part: usize| {
            let now = Instant::now();
            times[part] += (now - start).as_secs_f64() * 1e3;
            start = now;
        };
        let cpu = self.cpu;
        let (mut x, mut side, mut size) = (self.pixels.clone(), 768, 3);
        for stage in &self.stages {
            let normed = |x: Vec<f32>, is_asked: bool| {
                if is_asked { layer_norm(cpu, &stage.norm, &x) } else { x }
            };
            x = normed(x, size != 3);
            add(1);
            x = stage.convolution.forward(cpu, &x, (1, side, side, size));
            add(0);
            x = normed(x, size == 3);
            add(1);
            (side, size) = (stage.convolution.side(side), stage.convolution.matrix.outputs());
            let grid = (1, side, side, size);
            for (around, windows, around_channels, channels) in &stage.blocks {
                let convolve = |x: &mut [f32], (taps, bias): &(Vec<f32>, Vec<f32>)| {
                    depthwise_residual(cpu, x, grid, taps, bias);
                };
                convolve(&mut x, &around.taps[0]);
                add(2);
                windows.forward(cpu, &mut x, grid);
                add(3);
                convolve(&mut x, &around.taps[1]);
                add(2);
                around.mlp.forward(cpu, &mut x);
                add(5);
                convolve(&mut x, &around_channels.taps[0]);
                add(2);
                channels.forward(cpu, &mut x, side * side);
                add(4);
                convolve(&mut x, &around_channels.taps[1]);
                add(2);
                around_channels.mlp.forward(cpu, &mut x);
                add(5);
            }
        }
        let seen = std::mem::replace(&mut x, self.embeddings.clone());
        add(1);
        for Layer { products, mlp } in &self.layers {
            let [q, k, v] = [0, 1, 2].map(|i| linear(cpu, &products[i], &x, None));
            add(6);
            let keys = SequenceKeys::pack(&k, &v, D, 12, self.kept);
            let attended = attend_sequence(cpu, &q, &keys);
            add(7);
            x = linear(cpu, &products[3], &attended, Some(&x));
            add(6);
            x = layer_norm(cpu, &norm(D), &x);
            add(9);
            mlp.forward(cpu, &mut x);
            add(8);
            x = layer_norm(cpu, &norm(D), &x);
            add(9);
        }
        (times, [seen, x])
    }
}
