//! Products of int16 in AMX's tiles.
//!
//! AMX multiplies bytes. A number is 256 times its high byte, which has the sign, plus its low
//! byte: one product of int16 is four of bytes, and a block's sum, which fits an int32, is put
//! together from four sums without an error. The results are those of VNNI, bit by bit, so each
//! product may take the faster way.

#[cfg(test)]
mod emulator;
mod trial;

use std::arch::{
    asm,
    x86_64::{
        __cpuid_count, __m512, __m512i, _mm512_add_epi32, _mm512_cvtepi32_ps, _mm512_load_si512,
        _mm512_loadu_epi8, _mm512_maskz_loadu_epi32, _mm512_permutex2var_epi8,
        _mm512_setzero_si512, _mm512_slli_epi32, _mm512_store_si512,
    },
};

use pulp::{Simd, x86::V4};

use super::{
    quantize::INT16_STEPS,
    tile::{Product, Rows},
    unit::{Vnni16, bits},
};
use crate::kernels::{
    Cpu, Level,
    scratch::{Line, Lines, WIDTH},
};
use trial::Trial;

/// Rows of a tile; each is a line of 64 bytes.
const ROWS: usize = 16;
/// Lines of pairs that become a tile of high bytes and one of low bytes.
const DEPTH: usize = 2 * ROWS;
/// Fewer rows than this leave most of a tile empty: VNNI is as good.
const FEWEST: usize = ROWS;

/// Proof that the processor has tiles of bytes, which the system lets this process use, and VNNI.
#[derive(Debug, Clone, Copy)]
pub(in crate::kernels) struct Amx(Vnni16);

impl Amx {
    /// Tiles, if they are there, compute what VNNI computes, and take less time for it.
    pub(in crate::kernels) fn detect() -> Option<Self> {
        let tiles = Self(vector_instructions()?);
        (has_tiles() && may_use_tiles() && Trial::new(tiles).is_won()).then_some(tiles)
    }

    /// Tiles whose instructions are emulated where the processor has none.
    #[cfg(test)]
    pub(in crate::kernels) fn emulated() -> Option<Self> {
        emulator::install();
        vector_instructions().map(Self)
    }

    /// The rest of the instruction set.
    pub(in crate::kernels) fn simd(self) -> V4 {
        self.0.0
    }
}

/// Tiles for a product of so many rows, if it is worth it.
pub(super) fn for_rows(cpu: Cpu, rows: usize) -> Option<Amx> {
    match cpu.0 {
        Level::Amx(tiles) if rows >= FEWEST => Some(tiles),
        _ => None,
    }
}

/// AMX-TILE and AMX-INT8.
fn has_tiles() -> bool {
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    let features = __cpuid_count(7, 0).edx;
    features & TILE_AND_INT8 == TILE_AND_INT8
}

/// What else the code here is made of: VNNI and VBMI.
fn vector_instructions() -> Option<Vnni16> {
    let unit = Vnni16::new(Cpu(Level::Avx512(V4::try_new()?)))?;
    is_x86_feature_detected!("avx512vbmi").then_some(unit)
}

/// Asks the system for the tiles' state, which it grants to one process at a time.
fn may_use_tiles() -> bool {
    const REQUEST_PERMISSION: libc::c_int = 0x1023; // ARCH_REQ_XCOMP_PERM
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) };
    result == 0
}

/// What the tiles look like: all of them 16 lines of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    bytes_of_a_line: [u16; 16],
    lines: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start: 0,
    reserved: [0; 14],
    bytes_of_a_line: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    lines: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// This thread's tiles, for as long as it lives; the compiler knows of none. 0 to 3 are sums, 4 and
/// 5 high and low bytes of the left operand, 6 and 7 of the right one.
struct Tiles(Amx);

#[expect(clippy::unused_self, reason = "it stands for the registers")]
impl Tiles {
    fn new(proof: Amx) -> Self {
        // SAFETY: the processor has tiles, and all that do have this configuration.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const CONFIGURATION,
                options(readonly, nostack, preserves_flags)
            );
        }
        Self(proof)
    }

    /// Sums of 16 rows and a panel, over all their depth.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn totals(&mut self, left: &[[Line; DEPTH]], right: &[[Line; DEPTH]]) -> [pulp::f32x16; ROWS] {
        const TILES_OF_A_BLOCK: usize = INT16_STEPS / DEPTH;
        let simd = self.0.simd();
        let mut totals = [simd.splat_f32s(0.0); ROWS];
        let mut sums = [[Line::default(); ROWS]; 4];
        for (left, right) in left.chunks(TILES_OF_A_BLOCK).zip(right.chunks(TILES_OF_A_BLOCK)) {
            self.clear();
            for (left, right) in left.iter().zip(right) {
                self.multiply_add(left, right);
            }
            self.sums(&mut sums);
            for (row, total) in totals.iter_mut().enumerate() {
                let part = |i: usize| {
                    // SAFETY: a line is a register.
                    unsafe { _mm512_load_si512((&raw const sums[i][row]).cast()) }
                };
                let middle = _mm512_add_epi32(part(1), part(2));
                let upper = _mm512_add_epi32(_mm512_slli_epi32::<8>(part(0)), middle);
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), part(3));
                // SAFETY: as `bits!` has it.
                let sum = unsafe { bits!(__m512 => pulp::f32x16, _mm512_cvtepi32_ps(sum)) };
                *total = simd.add_f32s(*total, sum);
            }
        }
        totals
    }

    fn clear(&mut self) {
        // SAFETY: `new` has configured the tiles, which no other code touches.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    /// Adds the products of two pairs of tiles, high bytes before low bytes.
    fn multiply_add(&mut self, left: &[Line; DEPTH], right: &[Line; DEPTH]) {
        // SAFETY: as above; two tiles, a line of 64 bytes after the other, are what is read.
        unsafe {
            asm!(
                "tileloadd tmm4, [{left} + {line}]",
                "tileloadd tmm6, [{right} + {line}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                "tdpbusd tmm2, tmm5, tmm6",
                "tdpbuud tmm3, tmm5, tmm7",
                left = in(reg) left,
                right = in(reg) right,
                line = in(reg) size_of::<Line>(),
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// Writes the sums: of high bytes, of high by low, of low by high, of low bytes.
    fn sums(&self, to: &mut [[Line; ROWS]; 4]) {
        // SAFETY: as above; four tiles are what is written.
        unsafe {
            asm!(
                "tilestored [{to} + {line}], tmm0",
                "tilestored [{to} + {line} + 1024], tmm1",
                "tilestored [{to} + {line} + 2048], tmm2",
                "tilestored [{to} + {line} + 3072], tmm3",
                to = in(reg) to,
                line = in(reg) size_of::<Line>(),
                options(nostack, preserves_flags)
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as above. The system need not save tiles that are released.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// Where 64 numbers' bytes come from, of two registers of pairs: their low bytes; the high ones
/// are next to them.
type Order = [u8; 64];

/// Of a row of the left operand, in its order.
const LEFT: Order = {
    let mut order = [0; 64];
    let mut i = 0u8;
    while i < 64 {
        order[i as usize] = 2 * i;
        i += 1;
    }
    order
};

/// Of two lines of a panel, four numbers of every column.
const RIGHT: Order = {
    let mut order = [0; 64];
    let mut i = 0u8;
    while i < 64 {
        let (column, number) = (i / 4, i % 4);
        order[i as usize] = number / 2 * 64 + column * 4 + number % 2 * 2;
        i += 1;
    }
    order
};

/// Writes the high bytes and the low bytes of 64 numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn split(order: &Order, numbers: [__m512i; 2], high: &mut Line, low: &mut Line) {
    let [first, second] = numbers;
    // SAFETY: what is read and written is references' own.
    unsafe {
        let places = _mm512_loadu_epi8(order.as_ptr().cast());
        let lows = _mm512_permutex2var_epi8(first, places, second);
        _mm512_store_si512((&raw mut *low).cast(), lows);
        let next = _mm512_add_epi32(places, bits!([u8; 64] => __m512i, [1; 64]));
        let highs = _mm512_permutex2var_epi8(first, next, second);
        _mm512_store_si512((&raw mut *high).cast(), highs);
    }
}

impl Amx {
    /// # Safety
    ///
    /// None but the target features, which `self` proves.
    #[target_feature(
        enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vbmi,fma,avx2,bmi1,bmi2,lzcnt,popcnt"
    )]
    pub(super) unsafe fn multiply(self, product: &Product<'_>) {
        if !product.check(false) {
            return;
        }
        let (simd, x, b) = (self.simd(), product.x, product.b);
        let depth = b.steps.div_ceil(DEPTH);
        let mut left = Lines::new(x.count.div_ceil(ROWS) * depth * DEPTH);
        split_rows(x, b.steps, depth, &mut left);
        let (left, _) = left.as_chunks::<DEPTH>();
        let mut right = Lines::new(depth * DEPTH);
        let mut tiles = Tiles::new(self);
        for panel in product.panels.clone() {
            split_panel(&b.lines[panel * b.steps..][..b.steps], &mut right);
            let (right, _) = right.as_chunks::<DEPTH>();
            for (i, left) in left.chunks_exact(depth.max(1)).enumerate() {
                let totals = tiles.totals(left, right);
                let rows = ROWS.min(x.count - i * ROWS);
                let sums = bytemuck::must_cast_slice(&totals[..rows]);
                // SAFETY: rows and panel are within the bounds that were checked.
                unsafe { product.store(simd, sums, rows, (i * ROWS, panel * WIDTH)) };
            }
        }
    }
}

/// The left operand as tiles: of 16 rows after the other, all their depth. Rows beyond the last
/// one are what the buffer held; nobody looks at what becomes of them.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn split_rows(x: Rows<'_>, steps: usize, depth: usize, tiles: &mut [Line]) {
    for row in 0..x.count {
        let numbers = &x.data[row * x.stride..][..steps];
        let first = row / ROWS * depth * DEPTH + row % ROWS;
        for (i, numbers) in numbers.chunks(DEPTH).enumerate() {
            let (one, two) = numbers.split_at(numbers.len().min(WIDTH));
            let (high, low) = tiles[first + i * DEPTH..].split_at_mut(ROWS);
            split(&LEFT, [some(one), some(two)], &mut high[0], &mut low[0]);
        }
    }
}

/// A panel as tiles, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn split_panel(lines: &[Line], tiles: &mut [Line]) {
    for (lines, tiles) in lines.chunks(DEPTH).zip(tiles.chunks_mut(DEPTH)) {
        let (high, low) = tiles.split_at_mut(ROWS);
        for (i, (high, low)) in high.iter_mut().zip(low).enumerate() {
            let line = |i: usize| lines.get(i).map_or(_mm512_setzero_si512(), |x| some(&x.0));
            split(&RIGHT, [line(2 * i), line(2 * i + 1)], high, low);
        }
    }
}

/// Up to a register of numbers, filled up with zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn some(numbers: &[f32]) -> __m512i {
    let mask = if numbers.len() < WIDTH { (1u16 << numbers.len()) - 1 } else { u16::MAX };
    // SAFETY: only what the mask has is read.
    unsafe { _mm512_maskz_loadu_epi32(mask, numbers.as_ptr().cast()) }
}
