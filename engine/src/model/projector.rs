//! The projector: visual tokens to the language model's size, with positions and a pooled token.

use candle_core::{Result, Tensor};

use super::{
    LoadError,
    backend::{Backend, Layer, Loaded},
    scope::{Scope, Source},
};

pub(crate) struct Projector<B: Backend> {
    projection: B::Linear,
    norm: B::Norm,
    /// Position and time of every visual token of the usual picture, `[N, C]`.
    positions: Tensor,
    /// What they are made of, for pictures of other sizes.
    rows: Tensor,
    columns: Tensor,
}

impl<B: Backend> Projector<B> {
    /// `side` is the height and width of the last stage's grid.
    pub(crate) fn load(
        backend: &B,
        scope: &Scope<'_>,
        channels: usize,
        d_model: usize,
        side: usize,
    ) -> Loaded<Self> {
        // The two layouts store this matrix transposed to each other.
        let shape = [d_model, channels];
        let weight = if scope.shape("image_projection_transposed").is_some() {
            Source {
                name: "image_projection_transposed",
                stored: &[channels, d_model],
                shape,
                arrange: Tensor::t,
            }
        } else {
            Source::plain("image_projection.weight", &shape)
        };
        let projection = backend.linear(scope, &weight, None)?;
        let table = |name: &str| {
            let name = format!("image_position_embed.{name}.weight");
            let rows = scope.shape(&name).and_then(|shape| shape.first().copied());
            scope.get(&name, &[rows.unwrap_or(side), channels / 2])
        };
        let (rows, columns) = (table("row_embeddings")?, table("column_embeddings")?);
        if rows.dims()[0] < side || columns.dims()[0] < side {
            return Err(LoadError::Shape {
                name: "image_position_embed.row_embeddings.weight".to_owned(),
                expected: vec![side, channels / 2],
                found: rows.dims().to_vec(),
            });
        }
        Ok(Self {
            projection,
            norm: backend.norm(&scope.pp("image_proj_norm"), d_model)?,
            positions: positions(&rows, &columns, side).map_err(LoadError::Device)?,
            rows,
            columns,
        })
    }

    /// `[B, N, C] -> [B, 1 + N, D]`: the mean token first, then every token.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let n = x.dim(1)?;
        let x = if n == self.positions.dim(0)? {
            x.broadcast_add(&self.positions)?
        } else {
            x.broadcast_add(&positions(&self.rows, &self.columns, n.isqrt())?)?
        };
        let tokens = Tensor::cat(&[&x.mean_keepdim(1)?, &x], 1)?;
        self.norm.forward(&self.projection.forward(&tokens)?)
    }
}

/// `[side * side, C]`: the column's embedding, then the row's, plus the time signal of the only
/// frame, which is `sin(0), cos(0)` in turn.
fn positions(rows: &Tensor, columns: &Tensor, side: usize) -> Result<Tensor> {
    let half = rows.dim(1)?;
    let columns = columns.narrow(0, 0, side)?.unsqueeze(0)?.broadcast_as((side, side, half))?;
    let rows = rows.narrow(0, 0, side)?.unsqueeze(1)?.broadcast_as((side, side, half))?;
    let place = Tensor::cat(&[&columns, &rows], 2)?.reshape((side * side, 2 * half))?;
    let time: Vec<f32> = (0..2 * half).map(|i| (i % 2) as f32).collect();
    place.broadcast_add(&Tensor::new(time, rows.device())?)
}
