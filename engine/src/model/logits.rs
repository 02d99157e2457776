//! What a decoder step says of the next tokens: all logits of its rows, or the highest of each.

/// Logits of some rows, lent by a backend.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    values: &'a [f32],
    /// Of each row, how many there are.
    width: usize,
    highest: Option<Highest<'a>>,
}

/// What there is besides the values where most of them were left out.
#[derive(Debug, Clone, Copy)]
struct Highest<'a> {
    /// The tokens of the values, ascending in each row.
    ids: &'a [u32],
    /// Of each row, the logarithm of the sum of the exponentials of all its logits.
    log_sums: &'a [f32],
}

/// Logits of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) values: &'a [f32],
    ids: Option<&'a [u32]>,
    /// Of all logits of the row, if it is known.
    pub(crate) log_sum: Option<f32>,
}

impl<'a> Logits<'a> {
    /// All logits of rows, `[rows, width]`.
    pub fn all(values: &'a [f32], width: usize) -> Self {
        Self { values, width, highest: None }
    }

    /// The highest `width` of each row with their tokens, ascending by token, `[rows, width]`; and
    /// of each row the logarithm of the sum of the exponentials of all its logits.
    pub(crate) fn highest(
        values: &'a [f32],
        ids: &'a [u32],
        log_sums: &'a [f32],
        width: usize,
    ) -> Self {
        Self { values, width, highest: Some(Highest { ids, log_sums }) }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        let part = first * self.width..(first + count) * self.width;
        let highest = self.highest.map(|Highest { ids, log_sums }| Highest {
            ids: &ids[part.clone()],
            log_sums: &log_sums[first..first + count],
        });
        Self { values: &self.values[part], width: self.width, highest }
    }

    pub(crate) fn each(self) -> impl Iterator<Item = Row<'a>> + Clone {
        self.values.chunks_exact(self.width).enumerate().map(move |(i, values)| Row {
            values,
            ids: self.highest.map(|highest| &highest.ids[i * self.width..][..self.width]),
            log_sum: self.highest.map(|highest| highest.log_sums[i]),
        })
    }
}

impl Row<'_> {
    /// The token of a value.
    #[expect(clippy::cast_possible_truncation, reason = "tokens are u32")]
    pub(crate) fn token(self, index: usize) -> u32 {
        self.ids.map_or(index as u32, |ids| ids[index])
    }
}
