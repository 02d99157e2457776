//! How each kernel is launched, by the sizes of what it works on.
//!
//! The constants are those of the kernels' sources, where they have a comment. What is beyond the
//! kernels is refused by a panic, what is beyond the driver by the launch. No size is zero.

use crate::Launch;

const WARP: usize = 32;
const FLOAT: usize = size_of::<f32>();
/// The most elements of a head or of a group of channels.
const HEAD: usize = 64;

/// Tokens of a chunk of `channel_scores`. It is the same for all pictures: the order in which a
/// picture's tokens are added depends on it.
pub const CHANNEL_CHUNK: usize = 256;

/// Chunks of a picture of `n` tokens.
pub const fn channel_chunks(n: usize) -> usize {
    n.div_ceil(CHANNEL_CHUNK)
}

/// Elements of a row of `patches`: those of the patch, then zeros up to a multiple of eight.
pub const fn patch_length(channels: usize, size: usize) -> usize {
    (size * size * channels).next_multiple_of(8)
}

fn launch(grid: [usize; 3], block: usize, shared: usize) -> Launch {
    // Saturated, the number is more than any driver takes.
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Launch { grid: grid.map(number), block: number(block), shared: number(shared) }
}

/// Of kernels that work on `[rows, size]` element by element.
fn fours(rows: usize, size: usize) -> Launch {
    assert!(size.is_multiple_of(4), "rows of {size} elements");
    launch([rows.div_ceil(32), (size / 4).div_ceil(WARP), 1], 256, 0)
}

fn check_head(k: usize) {
    assert!(k.is_multiple_of(4) && k <= HEAD, "heads of {k} elements");
}

/// `layer_norm` of `[rows, size]`
pub fn layer_norm(rows: usize, size: usize) -> Launch {
    assert!(size.is_multiple_of(4) && size <= 4096, "rows of {size} elements");
    if size <= 512 {
        launch([rows.div_ceil(4), 1, 1], 128, 0)
    } else {
        launch([rows, 1, 1], 128, 2 * 4 * FLOAT)
    }
}

/// `bias_gelu` of `[rows, size]`
pub fn bias_gelu(rows: usize, size: usize) -> Launch {
    fours(rows, size)
}

/// `bias_residual` of `[rows, size]`
pub fn bias_residual(rows: usize, size: usize) -> Launch {
    fours(rows, size)
}

/// `add_bias` of `[rows, size]`
pub fn add_bias(rows: usize, size: usize) -> Launch {
    fours(rows, size)
}

/// `history_append` of `[rows, D]`
pub fn history_append(rows: usize, d: usize) -> Launch {
    fours(rows, d)
}

/// `embed` of `[rows, D]`
pub fn embed(rows: usize, d: usize) -> Launch {
    fours(rows, d)
}

/// The most rows that are few.
pub const FEW_ROWS: usize = 64;

/// `product` of `[rows, inputs]` and `[outputs, inputs]`
pub fn product(rows: usize, outputs: usize) -> Launch {
    let shared = 32 * (64 + 4 + 64 + 4) * FLOAT;
    launch([rows.div_ceil(64), outputs.div_ceil(64), 1], 256, shared)
}

/// `product_few` of the same
pub fn product_few(rows: usize, outputs: usize) -> Launch {
    let shared = 32 * (32 + 4 + 16 + 4) * FLOAT;
    launch([rows.div_ceil(32), outputs.div_ceil(16), 1], 128, shared)
}

/// `patches` that gives `[rows, patch_length]`, of `B * H' * W'` rows
pub fn patches(rows: usize, patch_length: usize) -> Launch {
    fours(rows, patch_length)
}

/// `depthwise` of `[B, H, W, C]`
pub fn depthwise(b: usize, h: usize, w: usize, c: usize) -> Launch {
    assert!(c.is_multiple_of(4), "{c} channels");
    launch([(w.div_ceil(8) * (c / 4)).div_ceil(256), h, b], 256, 0)
}

/// `window_attention` of `[B, H * W, 3 * heads * K]` in windows of `window * window`
pub fn window_attention(
    b: usize,
    [h, w]: [usize; 2],
    window: usize,
    heads: usize,
    k: usize,
) -> Launch {
    check_head(k);
    let (cells, parts) = (window * window, k.div_ceil(32));
    let (tile, block) = (cells.min(144 / parts), (cells * parts).next_multiple_of(WARP));
    let windows = h.div_ceil(window) * w.div_ceil(window);
    launch([windows, heads, b], block.min(256), 2 * tile * 32 * parts * FLOAT)
}

/// `channel_scores` of `[B, N, 3 * groups * K]`
pub fn channel_scores(b: usize, n: usize, groups: usize, k: usize) -> Launch {
    check_head(k);
    let splits = (256 / (k / 4).pow(2)).min(4);
    let shared = (2 * 32 * k).max(splits * k * k) * FLOAT;
    launch([channel_chunks(n), groups, b], 256, shared)
}

/// `channel_softmax` of `[B, groups, chunks, K, K]`
pub fn channel_softmax(b: usize, groups: usize, k: usize) -> Launch {
    check_head(k);
    launch([b * groups * k, 1, 1], 128, 4 * k * FLOAT)
}

/// `channel_apply` of `[B, N, 3 * groups * K]`
pub fn channel_apply(b: usize, n: usize, groups: usize, k: usize) -> Launch {
    check_head(k);
    launch([n.div_ceil(64), groups, b], 128, k * (64 + 4 + k) * FLOAT)
}

/// `sequence_attention` of `[rows, heads * K]` over so many sequences
pub fn sequence_attention(rows: usize, sequences: usize, heads: usize, k: usize) -> Launch {
    check_head(k);
    let shared = ((16 + 2 * 64) * (k + 4) + 16 * (64 + 4)) * FLOAT;
    launch([rows.div_ceil(16), heads, sequences.min(16)], 128, shared)
}

/// `history_attention` of `[rows, heads * K]`
pub fn history_attention(rows: usize, heads: usize, k: usize) -> Launch {
    check_head(k);
    launch([rows, heads, 1], 128, (5 * k + 8) * FLOAT)
}

/// `top_k` of so many rows
pub fn top_k(rows: usize) -> Launch {
    launch([rows, 1, 1], 1024, WARP * 3 * FLOAT)
}
