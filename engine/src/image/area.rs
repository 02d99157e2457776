//! Parts of a picture.

use super::Rgb;

/// A part of a picture, in whole pixels; never empty, and nowhere outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    pub(crate) left: usize,
    pub(crate) top: usize,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

impl Area {
    /// What lies within `[left, top, right, bottom]`, rounded as Pillow's `crop` does, as far as it
    /// is part of a picture of this size; none if nothing is.
    pub fn within(edges: [f64; 4], (width, height): (usize, usize)) -> Option<Self> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "brought into the picture"
        )]
        let edge = |at: f64, most: usize| at.round_ties_even().clamp(0.0, most as f64) as usize;
        let [left, top, right, bottom] = edges;
        let (left, top) = (edge(left, width), edge(top, height));
        let width = edge(right, width).checked_sub(left).filter(|width| *width > 0)?;
        let height = edge(bottom, height).checked_sub(top).filter(|height| *height > 0)?;
        Some(Self { left, top, width, height })
    }

    /// Where it begins.
    pub fn origin(&self) -> (usize, usize) {
        (self.left, self.top)
    }
}

impl Rgb {
    /// A copy of a part of the picture.
    #[must_use]
    pub fn part(&self, area: Area) -> Self {
        let Area { left, top, width, height } = area;
        let row = |y: usize| &self.data[3 * ((top + y) * self.width + left)..][..3 * width];
        Self { width, height, data: (0..height).flat_map(row).copied().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_rounded_and_stay_in_the_picture() {
        let area = |edges| Area::within(edges, (10, 8)).map(|a| (a.left, a.top, a.width, a.height));
        assert_eq!(area([1.2, 2.5, 3.5, 4.6]), Some((1, 2, 3, 3)));
        assert_eq!(area([-3.0, -1.0, 99.0, 99.0]), Some((0, 0, 10, 8)));
        for nothing in
            [[3.0, 1.0, 3.2, 5.0], [12.0, 0.0, 20.0, 5.0], [5.0, 5.0, 2.0, 6.0], [f64::NAN; 4]]
        {
            assert_eq!(area(nothing), None, "{nothing:?}");
        }
    }

    #[test]
    fn a_part_has_the_pixels_that_are_there() {
        let pixel = |i: usize| [i % 4, i / 4, 0].map(|value| u8::try_from(value).unwrap());
        let picture = Rgb { width: 4, height: 3, data: (0..12).flat_map(pixel).collect() };
        let part = picture.part(Area::within([1.0, 1.0, 3.0, 3.0], (4, 3)).unwrap());
        assert_eq!((part.width, part.height), (2, 2));
        assert_eq!(part.data, [1, 1, 0, 2, 1, 0, 1, 2, 0, 2, 2, 0]);
    }
}
