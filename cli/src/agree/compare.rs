//! How far two answers to one question are the same. Pure.

use florence_engine::Answer;
use serde_json::json;

use crate::draw::{Findings, Mark};

/// Found in both answers: the same label, and places that overlap so far.
const ALIKE: f64 = 0.5;

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Difference {
    /// Whether all tokens are the same.
    pub(super) ids: bool,
    /// Whether the same is said and named, wherever it is.
    pub(super) texts: bool,
    /// What was found in float32, in the other one, and alike.
    pub(super) expected: usize,
    pub(super) found: usize,
    pub(super) alike: usize,
    /// Intersection over union of what was found alike, added up.
    pub(super) iou: f64,
}

impl Difference {
    pub(super) fn of(expected: &Answer, found: &Answer) -> Self {
        let read = |answer: &Answer| Findings::read(&answer.json, &json!(answer.scores));
        let ids = expected.token_ids == found.token_ids;
        Self { ids, ..Self::of_findings(&read(expected), &read(found)) }
    }

    fn of_findings(expected: &Findings, found: &Findings) -> Self {
        let said = |it: &Findings| -> Vec<String> {
            let labels = it.marks.iter().map(|mark| mark.label.clone());
            labels.chain(it.texts.iter().map(|text| text.text.clone())).collect()
        };
        let mut pairs = Vec::new();
        for (i, a) in expected.marks.iter().enumerate() {
            for (j, b) in found.marks.iter().enumerate() {
                let iou = iou(bounds(a), bounds(b));
                if a.label == b.label && iou >= ALIKE {
                    pairs.push((iou, i, j));
                }
            }
        }
        // The best first; each is of one pair.
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (mut left, mut right) = (Vec::new(), Vec::new());
        let mut sum = 0.0;
        for (iou, i, j) in pairs {
            if !left.contains(&i) && !right.contains(&j) {
                left.push(i);
                right.push(j);
                sum += iou;
            }
        }
        Self {
            ids: false,
            texts: said(expected) == said(found),
            expected: expected.marks.len(),
            found: found.marks.len(),
            alike: left.len(),
            iou: sum,
        }
    }

    /// How much is the same, from 0 to 1: of what was found, else of what was said.
    pub(super) fn share(&self) -> f64 {
        if self.expected + self.found == 0 {
            return f64::from(u8::from(self.texts));
        }
        2.0 * self.iou / (self.expected + self.found) as f64
    }
}

/// All answers together.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Agreement {
    pub(super) answers: usize,
    pub(super) ids: usize,
    pub(super) texts: usize,
    both: usize,
    alike: usize,
    iou: f64,
}

impl Agreement {
    pub(super) fn add(&mut self, difference: &Difference) {
        self.answers += 1;
        self.ids += usize::from(difference.ids);
        self.texts += usize::from(difference.texts);
        self.both += difference.expected + difference.found;
        self.alike += difference.alike;
        self.iou += difference.iou;
    }

    /// The F1 score of what was found.
    pub(super) fn found_alike(&self) -> Option<f64> {
        (self.both > 0).then(|| 2.0 * self.alike as f64 / self.both as f64)
    }

    /// Of what was found alike.
    pub(super) fn mean_iou(&self) -> Option<f64> {
        (self.alike > 0).then(|| self.iou / self.alike as f64)
    }
}

/// The box around a mark: x1, y1, x2, y2.
fn bounds(mark: &Mark) -> [f64; 4] {
    let start = [f64::INFINITY, f64::INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY];
    mark.outlines
        .iter()
        .flatten()
        .fold(start, |[x1, y1, x2, y2], (x, y)| [x1.min(*x), y1.min(*y), x2.max(*x), y2.max(*y)])
}

fn iou(a: [f64; 4], b: [f64; 4]) -> f64 {
    let area = |[x1, y1, x2, y2]: [f64; 4]| (x2 - x1).max(0.0) * (y2 - y1).max(0.0);
    let both = area([a[0].max(b[0]), a[1].max(b[1]), a[2].min(b[2]), a[3].min(b[3])]);
    let either = area(a) + area(b) - both;
    // Two that have no area are the same where they are.
    let is_same = a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
    if either > 0.0 { both / either } else { f64::from(u8::from(is_same)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(expected: &serde_json::Value, found: &serde_json::Value) -> Difference {
        let read = |it: &serde_json::Value| Findings::read(it, &serde_json::Value::Null);
        Difference::of_findings(&read(expected), &read(found))
    }

    #[test]
    fn boxes_are_alike_by_label_and_place_and_each_once() {
        let od = |bboxes: &[[f64; 4]], labels: &[&str]| json!({ "<OD>": { "bboxes": bboxes, "labels": labels } });
        let expected = od(&[[0., 0., 10., 10.], [20., 0., 30., 10.]], &["a", "a"]);
        let same = difference(&expected, &expected);
        assert_eq!((same.alike, same.texts), (2, true));
        assert!((same.share() - 1.0).abs() < 1e-9);
        // One half as large, one of another label; one twice where there is one.
        let other = od(&[[0., 0., 10., 5.], [20., 0., 30., 10.]], &["a", "b"]);
        let found = difference(&expected, &other);
        assert_eq!((found.alike, found.texts, found.iou), (1, false, 0.5));
        let twice = od(&[[0., 0., 10., 10.], [0., 0., 10., 9.]], &["a", "a"]);
        let found = difference(&expected, &twice);
        assert_eq!((found.alike, found.iou), (1, 1.0));
        let mut all = Agreement::default();
        all.add(&same);
        all.add(&found);
        assert_eq!(all.found_alike(), Some(2.0 * 3.0 / 8.0));
        assert_eq!((all.mean_iou(), all.texts), (Some(1.0), 2));
    }

    #[test]
    fn captions_are_the_same_or_not() {
        let caption = |text: &str| json!({ "<CAPTION>": text });
        assert!((difference(&caption("a"), &caption("a")).share() - 1.0).abs() < 1e-9);
        assert!(difference(&caption("a"), &caption("b")).share().abs() < 1e-9);
        assert_eq!(Agreement::default().found_alike(), None);
    }
}
