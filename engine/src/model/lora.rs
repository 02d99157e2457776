//! What LoRA makes of a weight, as PEFT merges it: in float32, a product of two thin matrices
//! times a number is added; with DoRA, each output then gets the length that was learned for it.

use candle_core::{Result, Tensor};

/// What an adapter does to a weight.
pub(super) enum Change {
    Weight(Lora),
    /// It is added.
    Bias(Tensor),
    /// To a matrix that the checkpoint stores transposed.
    Transposed(Lora),
}

/// A low-rank change of a linear layer, a convolution or a table of embeddings.
pub(super) struct Lora {
    /// `[r, inputs..]`, of a table `[r, rows]`
    pub(super) a: Tensor,
    /// `[outputs, r]`, of a convolution `[outputs, r, 1, 1]`, of a table `[D, r]`
    pub(super) b: Tensor,
    pub(super) scale: f64,
    /// Of DoRA: the length of each output, of a table that of each column.
    pub(super) magnitude: Option<Tensor>,
    pub(super) is_embedding: bool,
}

impl Change {
    /// The weight as the adapter has it.
    pub(super) fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        match self {
            Self::Weight(lora) => lora.merged(weight),
            Self::Transposed(lora) => lora.merged(&weight.t()?)?.t()?.contiguous(),
            Self::Bias(bias) => weight + bias,
        }
    }
}

impl Lora {
    /// Whether it is of this rank and changes weights of this shape.
    pub(super) fn fits(&self, shape: &[usize], rank: usize) -> bool {
        let Some((outputs, inputs)) = shape.split_first() else { return false };
        let counted = if self.is_embedding { inputs } else { &[*outputs] };
        let magnitude = self.magnitude.as_ref().map(Tensor::elem_count);
        let of = |tensor: &Tensor, dims: &[usize]| tensor.dims() == dims;
        magnitude.is_none_or(|count| counted == [count])
            && if self.is_embedding {
                of(&self.a, &[rank, *outputs]) && of(&self.b, &[inputs, &[rank]].concat())
            } else {
                let ones = vec![1; inputs.len() - 1];
                of(&self.a, &[&[rank], inputs].concat())
                    && of(&self.b, &[&[*outputs, rank], &ones[..]].concat())
            }
    }

    fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let rank = self.a.dim(0)?;
        let product = self.b.reshape(((), rank))?.matmul(&self.a.reshape((rank, ()))?)?;
        let product = if self.is_embedding { product.t()? } else { product };
        let change = product.affine(self.scale, 0.0)?.reshape(weight.shape())?;
        let sum = (weight + change)?;
        let Some(magnitude) = &self.magnitude else { return Ok(sum) };
        let flat = sum.flatten_from(1)?;
        // Over all but the dimension that there is a length for.
        let over = usize::from(!self.is_embedding);
        let lengths = flat.sqr()?.sum_keepdim(over)?.sqrt()?;
        let factors = magnitude.reshape(lengths.shape())?.div(&lengths)?;
        flat.broadcast_mul(&factors)?.reshape(weight.shape())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_product_is_added_to_rows_of_outputs() {
        let lora = Lora {
            a: tensor(&[1.0, 2.0, 3.0], &[1, 3]),
            b: tensor(&[1.0, -1.0], &[2, 1]),
            scale: 0.5,
            magnitude: None,
            is_embedding: false,
        };
        assert!(lora.fits(&[2, 3], 1) && !lora.fits(&[3, 2], 1) && !lora.fits(&[2, 3], 2));
        let weight = tensor(&[0.0, 0.0, 0.0, 1.0, 1.0, 1.0], &[2, 3]);
        let expected = [0.5, 1.0, 1.5, 0.5, 0.0, -0.5];
        assert_eq!(values(&lora.merged(&weight).unwrap()), expected);
        let stored = weight.t().unwrap().contiguous().unwrap();
        let merged = Change::Transposed(lora).merged(&stored).unwrap();
        assert_eq!(merged.dims(), [3, 2]);
        assert_eq!(values(&merged.t().unwrap()), expected);
    }

    #[test]
    fn a_table_has_its_rows_in_a() {
        let lora = Lora {
            a: tensor(&[1.0, 2.0, 3.0], &[1, 3]),
            b: tensor(&[1.0, 10.0], &[2, 1]),
            scale: 1.0,
            magnitude: Some(tensor(&[14_f32.sqrt(), 1400_f32.sqrt() * 2.0], &[2])),
            is_embedding: true,
        };
        assert!(lora.fits(&[3, 2], 1) && !lora.fits(&[2, 3], 1));
        let merged = lora.merged(&tensor(&[0.0; 6], &[3, 2])).unwrap();
        for (found, expected) in values(&merged).iter().zip([1.0, 20.0, 2.0, 40.0, 3.0, 60.0]) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn outputs_of_a_convolution_get_the_lengths_that_were_learned() {
        let lora = Lora {
            a: tensor(&[3.0, 4.0], &[1, 2, 1, 1]),
            b: tensor(&[1.0, 0.0], &[2, 1, 1, 1]),
            scale: 1.0,
            magnitude: Some(tensor(&[10.0, 2.0], &[1, 2, 1, 1])),
            is_embedding: false,
        };
        assert!(lora.fits(&[2, 2, 1, 1], 1) && !lora.fits(&[2, 2], 1));
        let merged = lora.merged(&tensor(&[0.0, 0.0, 0.0, 1.0], &[2, 2, 1, 1])).unwrap();
        assert_eq!(values(&merged), [6.0, 8.0, 0.0, 2.0]);
    }
}
