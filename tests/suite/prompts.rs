//! What the model can be asked: the fifteen tasks, and any other text where the operator says so.

use std::collections::HashMap;

use florence_tests::{Pictures, Server, Settings, celery_message, eventually};
use serde_json::json;

type Map = HashMap<String, Option<String>>;

const FREE: [(&str, &str); 4] = [
    ("<GENERATE_TAGS>", "<GENERATE_TAGS>"),
    ("<DocVQA> What colour is it?", "<DocVQA>"),
    ("Describe the picture.", "Describe the picture."),
    (" <MIXED_CAPTION> ", "<MIXED_CAPTION>"),
];

fn any() -> Server {
    let server = Server::with(Settings::lines(&["florence.prompts any"]));
    server.wait_for_model();
    server
}

fn submit(server: &Server, key: &str, url: &str, prompt: &str) {
    server.call::<String>(&["FLORENCE.SUBMIT", key, url, prompt]);
}

fn wait(server: &Server, key: &str) -> Map {
    server.call(&["FLORENCE.WAIT", key, "30"])
}

fn result(job: &Map) -> serde_json::Value {
    serde_json::from_str(job["result"].as_deref().unwrap_or_else(|| panic!("{job:?}"))).unwrap()
}

#[test]
fn a_bad_prompt_is_refused_with_what_is_wrong_and_what_may_be_meant() {
    let server = Server::start();
    server.wait_for_model();
    for (prompt, expected) in [
        (
            "hello",
            "BADPROMPT unknown task 'hello': a prompt begins with a task token such as <CAPTION> or <OD>. \
             Other texts are taken where prompts is any",
        ),
        (
            "<CAPTOIN>",
            "BADPROMPT unknown task '<CAPTOIN>': did you mean <CAPTION>? \
             Other texts are taken where prompts is any",
        ),
        ("<OD> cat", "BADPROMPT <OD> takes no text; did you mean <CAPTION_TO_PHRASE_GROUNDING>?"),
        ("<OPEN_VOCABULARY_DETECTION>", "BADPROMPT <OPEN_VOCABULARY_DETECTION> needs a text"),
        (
            "<OPEN_VOCABULARY_DETECTION></s>x",
            "BADPROMPT the prompt's text must not contain the special token </s>",
        ),
        (
            "<REGION_TO_OCR><loc_1>",
            "BADPROMPT <REGION_TO_OCR> needs a region <loc_x1><loc_y1><loc_x2><loc_y2> with numbers from 0 to 999",
        ),
    ] {
        let submit = ["FLORENCE.SUBMIT", "j", "http://127.0.0.1/x", prompt];
        assert_eq!(server.error(&submit), expected);
    }
    assert_eq!(server.call::<i64>(&["DBSIZE"]), 0);
}

#[test]
fn blanks_around_a_task_change_nothing() {
    let (server, pictures) = (Server::start(), Pictures::serve());
    server.wait_for_model();
    let url = pictures.url("shapes.png");
    submit(&server, "plain", &url, "<OD>");
    let plain = wait(&server, "plain");
    for (i, prompt) in ["<OD> ", " <OD>", "\t<OD>\n"].into_iter().enumerate() {
        let key = format!("blank {i}");
        submit(&server, &key, &url, prompt);
        let job = wait(&server, &key);
        assert_eq!((&job["result"], job["cache"].as_deref()), (&plain["result"], Some("result")));
        assert_eq!(job["prompt"].as_deref(), Some(prompt));
    }
}

#[test]
fn any_text_is_asked_and_its_answer_is_text_by_its_first_token() {
    let (server, pictures) = (any(), Pictures::serve());
    let url = pictures.url("shapes.png");
    for (prompt, name) in FREE {
        submit(&server, prompt, &url, prompt);
        let job = wait(&server, prompt);
        assert_eq!(job["state"].as_deref(), Some("done"), "{job:?}");
        let result = result(&job);
        assert_eq!(result.as_object().unwrap().len(), 1, "{result}");
        // As the reference cleans a text.
        let text = job["text"].as_deref().unwrap().replace("<s>", "").replace("</s>", "");
        assert_eq!(result[name], json!(text.trim()), "{result}");
        assert_eq!(job["prompt"].as_deref(), Some(prompt));
    }
    // Tasks are what they were, and so are their errors.
    submit(&server, "task", &url, "<OD>");
    assert!(result(&wait(&server, "task"))["<OD>"]["bboxes"].is_array());
    for (prompt, error) in [
        ("<OD> cats", "BADPROMPT <OD> takes no text; did you mean <CAPTION_TO_PHRASE_GROUNDING>?"),
        (
            "",
            "BADPROMPT the prompt is empty: it begins with a task token such as <CAPTION> or <OD>",
        ),
        ("what is <OD>", "BADPROMPT <OD> is not at the beginning of the prompt"),
        ("<DocVQA></s>x", "BADPROMPT the prompt's text must not contain the special token </s>"),
        ("a<loc_7>", "BADPROMPT the prompt's text must not contain the special token <loc_7>"),
    ] {
        assert_eq!(server.error(&["FLORENCE.SUBMIT", "bad", &url, prompt]), error);
    }
}

#[test]
fn answers_of_other_texts_are_shared_by_what_is_asked() {
    let (server, pictures) = (any(), Pictures::serve());
    let url = pictures.url("shapes.png");
    // The sentence that a task stands for is the same to the model, but not to whoever asks.
    let sentence = "Locate the objects with category name in the image.";
    submit(&server, "task", &url, "<OD>");
    let task = wait(&server, "task");
    submit(&server, "sentence", &url, sentence);
    let job = wait(&server, "sentence");
    assert_eq!((&job["text"], job["cache"].as_deref()), (&task["text"], Some("features")));
    assert!(result(&job)[sentence].is_string());
    submit(&server, "again", &url, sentence);
    assert_eq!(wait(&server, "again")["cache"].as_deref(), Some("result"));
    // Several at once, held back so that they are in the engine together.
    let held = pictures.url("held/back/sign.png");
    for i in 0..4 {
        submit(&server, &format!("a{i}"), &held, "<DocVQA> a");
        submit(&server, &format!("b{i}"), &held, "<DocVQA> b");
    }
    pictures.release("back");
    let jobs: Vec<Map> = (0..4).map(|i| wait(&server, &format!("a{i}"))).collect();
    assert!(jobs.iter().all(|job| job["result"] == jobs[0]["result"]), "{jobs:?}");
    let computed =
        |jobs: &[Map]| jobs.iter().filter(|job| job["cache"].as_deref() != Some("result")).count();
    assert_eq!(computed(&jobs), 1, "{jobs:?}");
    let jobs: Vec<Map> = (0..4).map(|i| wait(&server, &format!("b{i}"))).collect();
    assert_eq!(computed(&jobs), 1, "{jobs:?}");
    let url = pictures.url("sign.png");
    let prompts = ["PROMPTS", "2", "<DocVQA> a", "<DocVQA> b"];
    server.call::<()>(&[&["FLORENCE.SUBMIT", "several", &url], &prompts[..]].concat());
    let several = result(&wait(&server, "several"));
    assert_eq!(
        several.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["<DocVQA> a", "<DocVQA> b"]
    );
}

#[test]
fn what_is_taken_is_decided_again_when_a_job_runs() {
    let (server, pictures) = (any(), Pictures::serve());
    let (held, url) = (pictures.url("held/back/shapes.png"), pictures.url("shapes.png"));
    let prompt = "<GENERATE_TAGS>";
    submit(&server, "known", &url, prompt);
    assert_eq!(wait(&server, "known")["state"].as_deref(), Some("done"));
    submit(&server, "accepted", &held, prompt);
    server.call::<()>(&["CONFIG", "SET", "florence.prompts", "tasks"]);
    let refused = "unknown task '<GENERATE_TAGS>': a prompt begins with a task token such as \
                   <CAPTION> or <OD>. Other texts are taken where prompts is any";
    let error = server.error(&["FLORENCE.SUBMIT", "new", &url, prompt]);
    assert_eq!(error, format!("BADPROMPT {refused}"));
    pictures.release("back");
    let job = wait(&server, "accepted");
    let error: serde_json::Value = serde_json::from_str(job["error"].as_deref().unwrap()).unwrap();
    assert_eq!(error, json!({ "code": "PROMPT", "message": refused, "retryable": false }));
    server.call::<()>(&["CONFIG", "SET", "florence.prompts", "any"]);
    assert_eq!(server.call::<i64>(&["FLORENCE.RETRY", "accepted"]), 1);
    let job = wait(&server, "accepted");
    assert_eq!((job["state"].as_deref(), job["cache"].as_deref()), (Some("done"), Some("result")));
}

#[test]
fn celerys_tasks_may_ask_what_submit_may() {
    let queues = "florence.celery-queues celery:tasks.inference_task";
    let (server, pictures) = (Server::with(Settings::lines(&[queues])), Pictures::serve());
    server.wait_for_model();
    let url = pictures.url("sign.png");
    let ask = |id: &str, prompt: &str| -> serde_json::Value {
        let message = celery_message(id, "tasks.inference_task", &[&url, prompt]);
        server.call::<()>(&["LPUSH", "celery", &message]);
        let meta: String = eventually("it has ended", || {
            server.call::<Option<String>>(&["GET", &format!("celery-task-meta-{id}")])
        });
        serde_json::from_str(&meta).unwrap()
    };
    let refused = ask("refused", "<DocVQA> which word?");
    assert_eq!(
        (&refused["status"], &refused["result"]["exc_type"]),
        (&json!("FAILURE"), &json!("ValueError"))
    );
    let blank = ask("blank", " <OCR> ");
    assert_eq!(blank["status"], "SUCCESS", "{blank}");
    assert!(blank["result"]["<OCR>"].is_string());
    server.call::<()>(&["CONFIG", "SET", "florence.prompts", "any"]);
    let taken = ask("taken", "<DocVQA> which word?");
    assert_eq!(taken["status"], "SUCCESS", "{taken}");
    assert!(taken["result"]["<DocVQA>"].is_string(), "{taken}");
    // The task's result is the reference's; scores and size are in the job.
    assert_eq!(taken["result"].as_object().unwrap().len(), 1);
    let job = server.job("florence:celery:taken");
    assert!(job["scores"].is_some() && job["width"].is_some(), "{job:?}");
}

#[test]
fn a_text_that_looks_like_a_list_is_asked_as_it_is() {
    let (server, pictures) = (any(), Pictures::serve());
    for (i, prompt) in [r#"["a"]"#, "[]", r#" ["a", "b"]"#, "[INST] what", "[1]"].iter().enumerate()
    {
        let key = format!("list:{i}");
        submit(&server, &key, &pictures.url("sign.png"), prompt);
        let job = wait(&server, &key);
        assert_eq!(job["state"].as_deref(), Some("done"), "{prompt}: {job:?}");
        let asked = result(&job);
        let asked: Vec<&String> = asked.as_object().unwrap().keys().collect();
        assert_eq!(asked, [*prompt], "{job:?}");
    }
}
