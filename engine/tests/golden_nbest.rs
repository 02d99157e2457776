//! The best beams and their scores against the reference's, and what else is told of them.

mod common;

use common::{fixture, path};
use florence_engine::{Decimals, Florence, GenerateOptions, LoadOptions, PrepareOptions};
use serde_json::json;

#[test]
fn the_best_beams_are_the_references() {
    let options = LoadOptions::default();
    let tiny = Florence::embedded(&options).unwrap();
    let random = Florence::load(&path("random-native"), &options).unwrap();
    let fixture = fixture("nbest.json");
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() >= 30);
    let mut differ = 0;
    for case in cases {
        let florence = if case["checkpoint"] == "tiny" { &tiny } else { &random };
        let picture = std::fs::read(path(case["picture"].as_str().unwrap())).unwrap();
        let prompt = case["prompt"].as_str().unwrap();
        let prepared = florence.prepare(&picture, prompt, &PrepareOptions::default()).unwrap();
        let n = usize::try_from(case["n"].as_u64().unwrap()).unwrap();
        #[expect(clippy::cast_possible_truncation, reason = "the reference's precision")]
        let length_penalty = case["length_penalty"].as_f64().map(|penalty| penalty as f32);
        let options = GenerateOptions {
            beams: Some(3),
            n_best: Some(n),
            max_new_tokens: Some(40),
            length_penalty,
            ..GenerateOptions::default()
        };
        let answer = florence.run_one(&prepared, &options).unwrap();
        let ids: Vec<_> = answer.n_best.iter().map(|one| &one.token_ids).collect();
        assert_eq!(json!(ids), case["token_ids"], "{case}");
        for (one, score) in answer.n_best.iter().zip(case["scores"].as_array().unwrap()) {
            let score = score.as_f64().unwrap();
            assert!((f64::from(one.score) - score).abs() < 1e-4, "{} {case}", one.score);
        }
        // The first is the answer, which does not depend on how many are told.
        let first = &answer.n_best[0];
        assert_eq!((&first.text, &first.json), (&answer.text, &answer.json));
        let alone = GenerateOptions { n_best: None, ..options };
        let alone = florence.run_one(&prepared, &alone).unwrap();
        assert!(alone.n_best.is_empty());
        assert_eq!((&alone.text, alone.score), (&answer.text, answer.score));
        differ += usize::from(answer.n_best.iter().any(|one| one.text != answer.text));
        let told = answer.n_best[n - 1].told(Decimals::default());
        assert_eq!(told["text"], answer.n_best[n - 1].text);
    }
    assert!(differ >= 20, "{differ}");
}

#[test]
fn greedy_search_has_one_and_a_search_knows_how_many_beams_it_has() {
    let florence = Florence::embedded(&LoadOptions::default()).unwrap();
    let picture = std::fs::read(path("pictures/00.png")).unwrap();
    let prepared = florence.prepare(&picture, "<CAPTION>", &PrepareOptions::default()).unwrap();
    let options = |beams| GenerateOptions { beams, n_best: Some(3), ..GenerateOptions::default() };
    assert_eq!(florence.beams(&options(None)), 3);
    assert_eq!(florence.beams(&options(Some(5))), 5);
    let answer = florence.run_one(&prepared, &options(Some(1))).unwrap();
    assert_eq!(answer.n_best.len(), 1);
    assert_eq!(answer.n_best[0].text, answer.text);
}
