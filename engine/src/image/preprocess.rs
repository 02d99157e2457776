//! `preprocessor_config.json`: RGB to the model's pixel values.

use serde::Deserialize;

use super::{ImageError, Rgb, resize_bicubic};

/// Pixel values in channel-first order, `3 * side * side` of them.
#[derive(Debug, Clone, PartialEq)]
pub struct PixelValues {
    /// Height and width of the model's square input.
    pub side: usize,
    /// Red plane, green plane, blue plane.
    pub data: Vec<f32>,
}

/// The steps of the reference's image processor: resize, rescale, normalise.
#[derive(Debug, Clone, Deserialize)]
pub struct Preprocessor {
    #[serde(default = "yes")]
    do_resize: bool,
    size: Size,
    #[serde(default = "rescale_factor")]
    rescale_factor: f64,
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

#[derive(Debug, Clone, Deserialize)]
struct Size {
    height: usize,
    width: usize,
}

fn rescale_factor() -> f64 {
    1.0 / 255.0
}

fn yes() -> bool {
    true
}

/// What every published Florence-2 has.
impl Default for Preprocessor {
    fn default() -> Self {
        Self {
            do_resize: true,
            size: Size { height: 768, width: 768 },
            rescale_factor: rescale_factor(),
            image_mean: [0.485, 0.456, 0.406],
            image_std: [0.229, 0.224, 0.225],
        }
    }
}

impl Preprocessor {
    /// Side of the square input, or `None` if the configuration asks for a rectangle or nothing.
    pub fn side(&self) -> Option<usize> {
        (self.size.height == self.size.width && self.size.height > 0).then_some(self.size.height)
    }

    /// Resizes, rescales in float64 and normalises in float32, like the reference on NumPy.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotResized`]: a picture that is not to be resized is no square, or larger
    /// than the one that the configuration names.
    #[expect(clippy::cast_possible_truncation, reason = "the reference rounds to float32 here")]
    pub fn pixel_values(&self, picture: &Rgb) -> Result<PixelValues, ImageError> {
        let Rgb { width, height, .. } = *picture;
        let most = self.size.width;
        if !self.do_resize && (width != height || width > most) {
            return Err(ImageError::NotResized { width, height, most });
        }
        let side = if self.do_resize { most } else { width };
        // One that has the size is left as it is.
        let resized = resize_bicubic(picture, side, side);
        let mut data = vec![0.0; 3 * side * side];
        for (channel, plane) in data.chunks_exact_mut(side * side).enumerate() {
            let (mean, std) = (self.image_mean[channel], self.image_std[channel]);
            let table: [f32; 256] = std::array::from_fn(|value| {
                ((value as f64 * self.rescale_factor) as f32 - mean) / std
            });
            for (out, pixel) in plane.iter_mut().zip(resized.data.chunks_exact(3)) {
                *out = table[usize::from(pixel[channel])];
            }
        }
        Ok(PixelValues { side, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_equal_the_references_numpy_path() {
        let config = r#"{"size":{"height":1,"width":1},
            "image_mean":[0.485,0.456,0.406],"image_std":[0.229,0.224,0.225]}"#;
        let preprocessor: Preprocessor = serde_json::from_str(config).unwrap();
        let check = |value: u8, expected: [f32; 3]| {
            let picture = Rgb { width: 1, height: 1, data: vec![value; 3] };
            let found = preprocessor.pixel_values(&picture).unwrap().data;
            assert_eq!(found, expected, "{value}");
        };
        check(0, [-2.117_904, -2.035_714_1, -1.804_444_4]);
        check(1, [-2.100_779_3, -2.018_207_3, -1.787_015_2]);
        check(128, [0.074_064_63, 0.205_182_2, 0.426_492_57]);
        check(255, [2.248_908_3, 2.428_571_5, 2.64]);
    }

    #[test]
    fn a_picture_that_is_not_resized_is_a_square_of_any_size_up_to_the_one_named() {
        let preprocessor = Preprocessor { do_resize: false, ..Preprocessor::default() };
        let values = |width: usize, height: usize| {
            let picture = Rgb { width, height, data: vec![128; 3 * width * height] };
            preprocessor.pixel_values(&picture)
        };
        for side in [1, 64, 768] {
            let PixelValues { side: found, data } = values(side, side).unwrap();
            assert_eq!((found, data.len()), (side, 3 * side * side));
        }
        for (width, height) in [(64, 65), (65, 64), (769, 769)] {
            let refused = values(width, height).unwrap_err().to_string();
            let expected = format!("the picture is {width}x{height}, but this model takes");
            assert!(refused.starts_with(&expected), "{refused}");
        }
    }
}
