//! The first use of AMX: a trial in a child process, whose end would be the child's only.

use std::time::{Duration, Instant};

use super::Amx;
use crate::{
    child,
    kernels::{
        Cpu, Level,
        gemm::{
            finish::{Finish, Target},
            tile::{Interleave, Panels, Product, Rows},
        },
        scratch::{Line, WIDTH},
    },
};

#[derive(Clone, Copy)]
enum Way {
    Tiles,
    Vnni,
}

/// A small product, done both ways.
pub(super) struct Trial {
    tiles: Amx,
    x: Vec<f32>,
    interleaved: Vec<f32>,
    lines: Vec<Line>,
}

impl Trial {
    const ROWS: usize = 64;
    const STEPS: usize = 250;
    const PANELS: usize = 5;

    pub(super) fn new(tiles: Amx) -> Self {
        // Of pairs that are anything, but too small for a block's sum to overflow.
        let pair = |i: u32| {
            let number = |i: u32| (i * 7919 % 8191).wrapping_sub(4095) & 0xffff;
            f32::from_bits(number(2 * i + 1) << 16 | number(2 * i))
        };
        let pairs = |count: usize| -> Vec<f32> { (0..).map(pair).take(count).collect() };
        let (lines, x) = (Self::PANELS * Self::STEPS, pairs(Self::ROWS * Self::STEPS));
        let lines = pairs(lines * WIDTH).as_chunks().0.iter().map(|pairs| Line(*pairs)).collect();
        let mut interleaved = vec![0.0; Interleave::length(Self::ROWS, Self::STEPS)];
        let (rows, out) = (Rows::new(&x, Self::STEPS, Self::ROWS), &mut interleaved);
        Cpu(Level::Avx512(tiles.simd())).run(Interleave { x: rows, steps: Self::STEPS, out });
        Self { tiles, x, interleaved, lines }
    }

    fn multiply(&self, way: Way, out: &mut [f32]) {
        let (columns, unit) = (Self::PANELS * WIDTH, self.tiles.0);
        let x = match way {
            Way::Tiles => &self.x,
            Way::Vnni => &self.interleaved,
        };
        let product = Product {
            x: Rows::new(x, Self::STEPS, Self::ROWS),
            b: Panels { lines: &self.lines, steps: Self::STEPS, columns },
            panels: 0..Self::PANELS,
            finish: &Finish::default(),
            out: &Target::new(out, columns, Self::ROWS, columns),
        };
        match way {
            // SAFETY: the system has granted them; whether they work is what is tried.
            Way::Tiles => unsafe { self.tiles.multiply(&product) },
            Way::Vnni => unit.multiply(&product),
        }
    }

    /// Processors and hypervisors have claimed tiles and died of them, so the first try is made
    /// where it can end a child only.
    pub(super) fn is_won(&self) -> bool {
        let mut results = [(); 2].map(|()| vec![0.0; Self::ROWS * Self::PANELS * WIDTH]);
        let [expected, found] = &mut results;
        self.multiply(Way::Vnni, expected);
        let mut try_tiles = || {
            self.multiply(Way::Tiles, found);
            found == expected
        };
        if !child::succeeds(&mut try_tiles) {
            return false;
        }
        let mut fastest = |way| {
            let mut time = || {
                let start = Instant::now();
                self.multiply(way, found);
                start.elapsed()
            };
            (0..20).map(|_| time()).min().unwrap_or(Duration::MAX)
        };
        fastest(Way::Tiles) < fastest(Way::Vnni)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{kernels::gemm::amx::has_tiles, not_run};

    #[test]
    fn a_trial_compares_products_that_are_equal() {
        let Some(tiles) = Amx::emulated() else {
            return not_run("no AVX512-VNNI and AVX512-VBMI here");
        };
        let trial = Trial::new(tiles);
        let product = |way| {
            let mut out = vec![0.0; Trial::ROWS * Trial::PANELS * WIDTH];
            trial.multiply(way, &mut out);
            out
        };
        let (expected, found) = (product(Way::Vnni), product(Way::Tiles));
        assert!(expected.iter().all(|x| *x != 0.0), "numbers that say something");
        assert_eq!(found, expected);
    }

    #[test]
    fn tiles_that_a_processor_only_claims_are_not_used() {
        // Its handler must not matter: the instructions are illegal, as if only claimed.
        let Some(tiles) = Amx::emulated() else {
            return not_run("no AVX512-VNNI and AVX512-VBMI here");
        };
        if has_tiles() {
            return not_run("the processor does have AMX");
        }
        assert!(!Trial::new(tiles).is_won());
    }
}
