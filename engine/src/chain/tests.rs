use super::*;
use crate::Timings;

fn step(text: &str) -> Step {
    text.parse().unwrap()
}

fn chain(prompt: &str, steps: &[&str]) -> Chain {
    Chain {
        prompts: vec![prompt.to_owned()],
        steps: steps.iter().map(|text| step(text)).collect(),
        margin: 0,
        most_regions: 3,
    }
}

/// What the model says to a question about a picture of 1000 by 500 pixels, or about a part of it.
fn answer(asked: &Asked, text: &str) -> Arc<Answer> {
    let prompt = Prompt::parse(&asked.prompt, Prompts::Tasks).unwrap();
    let size = asked.area.map_or((1000, 500), |area| (area.width, area.height));
    let parsed =
        post_process(prompt.answer(), text, Scale { size, coordinates: Coordinates::Float });
    let json = json!({ prompt.name(): parsed.json });
    Arc::new(Answer {
        text: text.to_owned(),
        token_ids: vec![0, 2],
        json,
        scores: vec![0.5],
        size,
        score: 0.0,
        n_best: Vec::new(),
        timings: Timings::default(),
    })
}

fn run(chain: Chain) -> Run {
    chain.check(Prompts::Tasks).unwrap();
    Run::new(chain, Prompts::Tasks)
}

/// Answers what is asked now, all of it alike; returns the prompts.
fn reply(run: &mut Run, text: &str) -> Vec<String> {
    let asked = run.asks().to_vec();
    run.answered(asked.iter().map(|asked| answer(asked, text)));
    asked.into_iter().map(|asked| asked.prompt).collect()
}

const TWO_BOXES: &str =
    "</s><s>car<loc_100><loc_200><loc_300><loc_400>dog<loc_500><loc_0><loc_999><loc_999></s>";

#[test]
fn then_asks_about_the_text_before() {
    let mut run = run(chain("<CAPTION>", &["THEN <CAPTION_TO_PHRASE_GROUNDING> {}"]));
    assert_eq!(reply(&mut run, "<s>a car</s>"), ["<CAPTION>"]);
    assert!(!run.is_over());
    assert_eq!(
        reply(&mut run, "a car<loc_1><loc_2><loc_3><loc_4>"),
        ["<CAPTION_TO_PHRASE_GROUNDING> a car"]
    );
    assert!(run.is_over());
    let told = run.told(Decimals::default());
    let steps = &told.json["steps"];
    assert_eq!(steps[0], json!({ "prompt": "<CAPTION>", "answer": { "<CAPTION>": "a car" } }));
    assert_eq!(steps[1]["prompt"], "<CAPTION_TO_PHRASE_GROUNDING> {}");
    assert_eq!(steps[1]["asked"], "<CAPTION_TO_PHRASE_GROUNDING> a car");
    assert_eq!(steps[1]["answer"]["<CAPTION_TO_PHRASE_GROUNDING>"]["labels"], json!(["a car"]));
    assert_eq!((told.tokens, told.size), (4, (1000, 500)));
    assert_eq!(told.text, json!(["<s>a car</s>", "a car<loc_1><loc_2><loc_3><loc_4>"]));
}

#[test]
fn each_asks_about_every_region_with_its_place_or_its_label() {
    let segmentation = ["EACH <REGION_TO_SEGMENTATION>", "EACH <REGION_TO_SEGMENTATION>{}"];
    let places = [
        "<REGION_TO_SEGMENTATION><loc_100><loc_200><loc_300><loc_400>",
        "<REGION_TO_SEGMENTATION><loc_500><loc_0><loc_999><loc_999>",
    ];
    let labels =
        ["<REFERRING_EXPRESSION_SEGMENTATION> a car", "<REFERRING_EXPRESSION_SEGMENTATION> a dog"];
    for (step, expected) in [
        (segmentation[0], places),
        (segmentation[1], places),
        ("EACH <REFERRING_EXPRESSION_SEGMENTATION> a {}", labels),
    ] {
        let mut run = run(chain("<OD>", &[step]));
        reply(&mut run, TWO_BOXES);
        assert_eq!(reply(&mut run, "<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6>"), expected);
        let told = run.told("0".parse().unwrap());
        let each = &told.json["steps"][1]["each"];
        assert_eq!(each[0]["region"], json!([101.0, 100.0, 301.0, 200.0]));
        assert_eq!(
            (&each[1]["label"], &told.json["steps"][1]["left_out"]),
            (&json!("dog"), &json!(0))
        );
        assert_eq!(told.scores, json!([[0.5], [[0.5], [0.5]]]));
    }
}

#[test]
fn crops_are_asked_a_few_at_a_time_and_answer_in_the_whole_picture() {
    let mut chain = chain("<OCR_WITH_REGION>", &["CROP <OD>"]);
    (chain.margin, chain.most_regions) = (50, 20);
    let mut run = run(chain);
    let quad = "x<loc_100><loc_100><loc_200><loc_100><loc_200><loc_300><loc_100><loc_300>";
    reply(&mut run, &quad.repeat(9));
    let first = run.asks()[0].clone();
    // 100 to 200 of 1000 and 100 to 300 of 500 pixels, and half of that on each side.
    assert_eq!(
        first.area.map(|area| (area.left, area.top, area.width, area.height)),
        Some((50, 0, 200, 200))
    );
    assert_eq!(reply(&mut run, "x<loc_0><loc_500><loc_999><loc_999>").len(), 8);
    assert!(!run.is_over());
    assert_eq!(reply(&mut run, "x<loc_0><loc_500><loc_999><loc_999>").len(), 1);
    assert!(run.is_over());
    let told = run.told("1".parse().unwrap());
    let crops = told.json["steps"][1]["crop"].as_array().unwrap();
    assert_eq!(crops.len(), 9);
    assert_eq!(crops[0]["answer"]["<OD>"]["bboxes"][0], json!([50.1, 100.1, 249.9, 199.9]));
}

#[test]
fn regions_that_are_too_many_or_cannot_be_asked_are_counted() {
    let mut run = run(chain("<OD>", &["EACH <REGION_TO_CATEGORY>", "THEN <OCR>"]));
    reply(&mut run, &"a<loc_1><loc_1><loc_2><loc_2>".repeat(5));
    assert_eq!(reply(&mut run, "a").len(), 3);
    assert_eq!(reply(&mut run, "text"), ["<OCR>"]);
    assert_eq!(run.told(Decimals::default()).json["steps"][1]["left_out"], 2);
    // Without labels there is nothing to ask for them.
    let mut run = self::run(chain("<REGION_PROPOSAL>", &["EACH <OPEN_VOCABULARY_DETECTION>{}"]));
    reply(&mut run, "<loc_1><loc_1><loc_2><loc_2>");
    assert!(run.is_over());
    assert_eq!(run.told(Decimals::default()).json["steps"][1]["left_out"], 1);
}

#[test]
fn nothing_found_is_nothing_asked() {
    let steps = ["EACH <REGION_TO_OCR>", "THEN <CAPTION_TO_PHRASE_GROUNDING> {}", "CROP <OCR>"];
    let mut run = run(chain("<OD>", &steps));
    reply(&mut run, "</s><s></s>");
    assert!(run.is_over());
    let told = run.told(Decimals::default());
    assert_eq!(told.json["steps"][1]["each"], json!([]));
    assert_eq!(told.json["steps"][2]["answer"], Value::Null);
    assert_eq!(told.json["steps"][3]["crop"], json!([]));
}

#[test]
fn prompts_alone_are_told_as_ever() {
    let mut one = run(chain("<OD>", &[]));
    reply(&mut one, TWO_BOXES);
    let told = one.told(Decimals::default());
    assert_eq!(told.json["<OD>"]["labels"], json!(["car", "dog"]));
    assert_eq!((told.text, told.scores), (json!(TWO_BOXES), json!([0.5])));
    let mut two = chain("<OD>", &[]);
    two.prompts.push("<CAPTION>".to_owned());
    let mut two = run(two);
    assert_eq!(reply(&mut two, "a"), ["<OD>", "<CAPTION>"]);
    let told = two.told(Decimals::default());
    assert_eq!(told.json["<CAPTION>"], "a");
    assert_eq!(told.text, json!(["a", "a"]));
}

#[test]
fn what_is_wrong_with_a_chain_is_said() {
    let refused =
        |steps: &[&str]| chain("<OD>", steps).check(Prompts::Tasks).unwrap_err().to_string();
    assert!(
        refused(&["EACH <CAPTION>"]).starts_with("EACH asks about regions: <CAPTION> takes none")
    );
    assert_eq!(
        refused(&["CROP <REGION_TO_OCR>"]),
        "<REGION_TO_OCR> needs a region: EACH asks it about each"
    );
    assert_eq!(refused(&["THEN <OCR>"; 4]), "a chain has at most 4 steps, this one has 5");
    assert!(refused(&["THEN <OCR> {}"]).starts_with("<OCR> takes no text"));
    assert!(refused(&["THEN hello {}"]).starts_with("unknown task"));
    let mut two = chain("<OD>", &["THEN <OCR>"]);
    two.prompts.push("<CAPTION>".to_owned());
    assert_eq!(two.check(Prompts::Tasks), Err(ChainError::SeveralPrompts));
    assert_eq!("AFTER <OD>".parse::<Step>(), Err(ChainError::NoLink));
    assert_eq!(step("each  <OD>{}"), Step { link: Link::Each, prompt: " <OD>{}".to_owned() });
    assert_eq!(chain("<OD>", &["EACH describe the {}"]).check(Prompts::Any), Ok(()));
}

#[test]
fn texts_lose_the_region_that_they_are_about() {
    assert_eq!(without_locations("a car<loc_1><loc_22> x <loc_3"), "a car x 3");
    assert_eq!(without_locations(" a < b > c "), "a < b > c");
}
