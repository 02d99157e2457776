//! `preprocessor_config.json`: RGB to the model's pixel values.

use serde::Deserialize;

use super::{Rgb, resize_bicubic};

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

impl Preprocessor {
    /// Side of the square input, or `None` if the configuration asks for a rectangle or nothing.
    pub fn side(&self) -> Option<usize> {
        (self.size.height == self.size.width && self.size.height > 0).then_some(self.size.height)
    }

    /// Resizes, rescales in float64 and normalises in float32, like the reference on NumPy.
    #[expect(clippy::cast_possible_truncation, reason = "the reference rounds to float32 here")]
    pub fn pixel_values(&self, picture: &Rgb) -> PixelValues {
        let side = self.size.width;
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
        PixelValues { side, data }
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
            let found = preprocessor.pixel_values(&picture).data;
            assert_eq!(found, expected, "{value}");
        };
        check(0, [-2.117_904, -2.035_714_1, -1.804_444_4]);
        check(1, [-2.100_779_3, -2.018_207_3, -1.787_015_2]);
        check(128, [0.074_064_63, 0.205_182_2, 0.426_492_57]);
        check(255, [2.248_908_3, 2.428_571_5, 2.64]);
    }
}
