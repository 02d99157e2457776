//! Resize and beam search against the reference's own results, without a model.
#![expect(clippy::cast_possible_truncation, reason = "tests and their helpers")]

mod common;

use common::fixture;
use florence_engine::{
    generate::{Rules, Search},
    image::{Rgb, resize_bicubic},
    model::Logits,
};
use sha2::{Digest, Sha256};

/// The formula of `resize.json`: a picture that any language can make.
fn synthetic(width: usize, height: usize) -> Rgb {
    let value = |y: usize, x: usize, c: usize| ((7 * x + 13 * y + 31 * c + x * y / 5) & 255) as u8;
    let mut data = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            data.extend((0..3).map(|c| value(y, x, c)));
        }
    }
    Rgb { width, height, data }
}

#[test]
fn resizing_equals_pillow_to_the_last_bit() {
    let fixture = fixture("resize.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let size = |name: &str| usize::try_from(case[name].as_u64().unwrap()).unwrap();
        let resized = resize_bicubic(&synthetic(size("w"), size("h")), 768, 768);
        let digest = format!("{:x}", Sha256::digest(&resized.data));
        // Pillow 13 changed the order of passes for tall pictures; the reference is older.
        assert_eq!(digest, case["sha256_horizontal_first"], "{}x{}", size("w"), size("h"));
    }
}

const VOCABULARY: usize = 11;

/// The formula of `beam.json`: logits that depend on the last three tokens, in integers.
fn toy_logits(sequence: &[u32], seed: u32) -> Vec<f32> {
    let mut hash = seed.wrapping_mul(2_654_435_761);
    for token in &sequence[sequence.len().saturating_sub(3)..] {
        hash = (hash ^ (token + 1)).wrapping_mul(16_777_619);
    }
    hash ^= (sequence.len() as u32).wrapping_mul(40_503);
    let logit = |v: u32| {
        let g = (hash ^ v.wrapping_mul(2_246_822_519)).wrapping_mul(3_266_489_917);
        (((g >> 15) & 0x7fff) as f32 - 16_384.0) / 4096.0
    };
    (0..VOCABULARY as u32).map(logit).collect()
}

#[test]
fn searches_equal_the_references() {
    let fixture = fixture("beam.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 240);
    let mut early = 0;
    for case in cases {
        let number = |name: &str| usize::try_from(case[name].as_u64().unwrap()).unwrap();
        let rules = Rules {
            vocabulary: VOCABULARY,
            beams: number("num_beams"),
            max_length: 1 + number("max_new_tokens"),
            no_repeat_ngram: number("no_repeat_ngram_size"),
            early_stopping: case["early_stopping"].as_bool().unwrap_or(true),
            length_penalty: case["length_penalty"].as_f64().unwrap_or(1.0) as f32,
            sampling: None,
            start: 2,
            eos: 2,
            forced_bos: Some(0),
            forced_eos: Some(2),
        };
        let seed = number("seed") as u32;
        let mut search = Search::new(rules);
        let mut settled = vec![search.settled().to_vec()];
        while !search.is_finished() {
            let logits: Vec<f32> =
                search.sequences().flat_map(|sequence| toy_logits(sequence, seed)).collect();
            search.advance((!search.is_forced()).then(|| Logits::all(&logits, VOCABULARY)));
            settled.push(search.settled().to_vec());
        }
        let all = search.finish(number("num_beams"));
        assert!(all.is_sorted_by(|a, b| a.score >= b.score), "{case}");
        let found = all[0].clone();
        assert_eq!(serde_json::json!(found.ids), case["sequence"], "{case}");
        // What was known on the way only grew, to the whole of it.
        assert_eq!(settled.last(), Some(&found.ids), "{case}");
        assert!(settled.is_sorted_by(|a, b| b.starts_with(a)), "{case}: {settled:?}");
        early += settled.iter().rev().skip(1).take(1).map(|ids| ids.len() - 1).sum::<usize>();
        if let Some(score) = case["score"].as_f64() {
            assert!((f64::from(found.score) - score).abs() < 1e-5, "{} {case}", found.score);
        }
        if let Some(scores) = case["transition_scores"].as_array() {
            for (found, expected) in found.token_scores.iter().zip(scores) {
                let difference = f64::from(*found) - expected.as_f64().unwrap();
                assert!(difference.abs() < 1e-5, "{case}");
            }
        }
    }
    assert!(early > 2 * cases.len(), "{early} tokens known before the last step");
}
