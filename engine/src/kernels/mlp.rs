//! The two-layer perceptron of every block: `x + fc2(gelu(fc1(x)))`.

use rayon::prelude::*;

use super::{
    Cpu,
    gemm::{FEW_ROWS, Finish, Matrix, Rows, Then, block_rows, linear_into, padded},
    rows::{LayerNorm, Norm, layer_norm},
    scratch::Lines,
};

/// `x + fc2(gelu(fc1(norm(x))))`; without a norm, `fc1` sees `x` itself.
#[derive(Debug)]
pub(crate) struct Mlp {
    pub(crate) norm: Option<Norm>,
    pub(crate) fc1: Matrix,
    pub(crate) fc2: Matrix,
}

impl Mlp {
    /// Rows of `x`, in their place; the hidden layer of a block of rows never leaves the cache.
    pub(crate) fn forward(&self, cpu: Cpu, x: &mut [f32]) {
        let (size, hidden) = (self.fc1.inputs(), self.fc1.outputs());
        let rows = x.len() / size.max(1);
        let onto = Finish { then: Then::Add, ..Finish::default() };
        let gelu = Finish { then: Then::Gelu, ..Finish::default() };
        if rows <= FEW_ROWS {
            let normed = self.norm.as_ref().map(|norm| layer_norm(cpu, norm, x));
            let mut between = vec![0.0; rows * hidden];
            linear_into(cpu, &self.fc1, normed.as_deref().unwrap_or(x), gelu, &mut between);
            return linear_into(cpu, &self.fc2, &between, onto, x);
        }
        let block = block_rows(rows);
        x.par_chunks_mut(block * size).for_each(|x| {
            let count = x.len() / size;
            let (stride, hidden_stride) = (padded(size), padded(hidden));
            let mut input = Lines::floats(count * stride);
            let mut between = Lines::floats(count * hidden_stride);
            let (input, between) = (input.as_floats(), between.as_floats());
            if let Some(norm) = &self.norm {
                cpu.run(LayerNorm { norm, x, stride: size, out: input, out_stride: stride });
            } else {
                for (to, from) in input.chunks_mut(stride).zip(x.chunks_exact(size)) {
                    to[..size].copy_from_slice(from);
                }
            }
            self.fc1.block(cpu, Rows::new(input, stride, count), &gelu, between, hidden_stride);
            self.fc2.block(cpu, Rows::new(between, hidden_stride, count), &onto, x, size);
        });
    }
}
