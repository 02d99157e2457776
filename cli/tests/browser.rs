//! `florence web` in a real browser, as its users see it.
#![expect(clippy::unwrap_used, reason = "tests and their helpers")]

mod common;

use std::path::PathBuf;

use common::{Page, browser::Browser};
use florence_tests::{Pictures, Server, celery_message, eventually, picture};
use serde_json::{Value, json};

fn server() -> Server {
    let samples = picture("shapes.png").parent().unwrap().display().to_string();
    Server::ready(&[
        &format!("florence.file-roots {samples}"),
        "florence.celery-queues celery:tasks.ask",
    ])
}

fn sample(name: &str) -> String {
    picture(name).display().to_string()
}

fn window() -> Browser {
    Browser::start(1280, 900)
}

fn address(page: &Page, part: &str) -> String {
    format!("http://127.0.0.1:{}/#/{part}", page.port)
}

fn answered(server: &Server, key: &str, image: &str, prompt: &str) {
    server.call::<()>(&["FLORENCE.SUBMIT", key, image, prompt]);
    server.call::<redis::Value>(&["FLORENCE.WAIT", key, "60"]);
}

/// A job with its picture, whose answer is this.
fn forged(server: &Server, key: &str, result: &Value) {
    let mut job = redis::cmd("HSET");
    job.arg(key).arg("thumbnail").arg(std::fs::read(picture("shapes.png")).unwrap());
    for (name, value) in [
        ("florence", "1"),
        ("state", "done"),
        ("image", "DATA"),
        ("prompt", "<OD>"),
        ("width", "360"),
        ("height", "280"),
        ("submitted_at", "1700000000000"),
        ("started_at", "1700000000100"),
        ("finished_at", "1700000000900"),
        ("attempts", "1"),
        ("queue_ms", "100"),
        ("fetch_ms", "200"),
        ("infer_ms", "500"),
        ("text", "</s>"),
        ("tokens", "9"),
        ("cache", "miss"),
        ("model", "tiny"),
    ] {
        job.arg(name).arg(value);
    }
    job.arg("result").arg(result.to_string()).exec(&mut server.connect()).unwrap();
}

#[test]
fn every_part_shows_itself_without_an_error() {
    let server = server();
    let message = celery_message("id-1", "tasks.ask", &[&sample("sign.png"), "<OCR>"]);
    server.call::<()>(&["LPUSH", "celery", &message]);
    eventually("the task is answered", || (server.stat("jobs_done") == 1).then_some(()));
    answered(&server, "job:1", &sample("shapes.png"), "<OD>");
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "overview"));
    browser.wait("document.querySelector('#servers')?.innerText.includes('tiny (ready)')");
    browser.wait("document.querySelectorAll('figure svg path.line').length >= 10");
    browser.wait("document.querySelector('#numbers')?.innerText.includes('answered')");
    browser.click("#pages a:nth-of-type(2)");
    browser.click(".tabs button:nth-of-type(5)");
    browser.wait("document.querySelector('.long-body')?.innerText.includes('job:1')");
    browser.click(".long-body .long-row");
    browser.wait("document.querySelector('#facts')?.innerText.includes('shapes.png')");
    browser.wait("document.querySelector('#timeline')?.innerText.includes('in all')");
    browser.click("#pages a:nth-of-type(3)");
    browser.wait("document.querySelectorAll('.task').length === 15");
    browser.click("#pages a:nth-of-type(4)");
    browser.wait("document.querySelector('.long-body')?.innerText.includes('SUCCESS')");
    browser.wait("document.querySelector('.long-body')?.innerText.includes('id-1')");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn jobs_are_retried_and_cancelled_and_deleted_by_hand() {
    let (server, pictures) = (server(), Pictures::serve());
    let held = pictures.url("held/back/sign.png");
    server.call::<()>(&["FLORENCE.SUBMIT", "waits", &held, "<OCR>"]);
    for key in ["lost:1", "lost:2"] {
        let away = ["FLORENCE.SUBMIT", key, &pictures.url("status/404"), "<OD>"];
        server.call::<()>(&away);
        server.call::<redis::Value>(&["FLORENCE.WAIT", key, "30"]);
    }
    let (page, browser) = (Page::about(&[&server], &[]), window());
    // One, from its own part.
    browser.go(&address(&page, "job?server=0&id=waits"));
    browser.click("button[data-action=cancel]");
    browser.wait("document.querySelector('#job')?.innerText.includes('cancelled')");
    assert_eq!(server.state("waits"), "cancelled");
    // Some, from a list: by mouse and by keyboard.
    browser.go(&address(&page, "jobs?state=failed"));
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 2");
    let asked = pictures.hits();
    browser.click(".long-body .long-row:nth-of-type(1) input");
    browser.write(".long-scroll", "\u{e015}\u{e015} ");
    browser.wait("document.querySelector('.actions')?.innerText.includes('2 selected')");
    browser.click("button[data-action=retry]");
    browser.wait("document.querySelector('#toast')?.innerText.includes('2 queued again')");
    eventually("both are tried again", || (pictures.hits() == asked + 2).then_some(()));
    // All that match.
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 2");
    browser.click(".actions button:nth-of-type(1)");
    browser.click("button[data-action=delete]");
    // One that comes while the page asks was not counted.
    let late = ["FLORENCE.SUBMIT", "lost:3", &pictures.url("status/404"), "<OD>"];
    server.call::<()>(&late);
    server.call::<redis::Value>(&["FLORENCE.WAIT", "lost:3", "30"]);
    browser.accept();
    browser.wait("document.querySelector('#toast')?.innerText.includes('2 deleted')");
    assert_eq!(server.call::<i64>(&["EXISTS", "lost:1", "lost:2"]), 0);
    assert_eq!(server.call::<i64>(&["EXISTS", "lost:3", "waits"]), 2);
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn a_search_looks_at_jobs_of_all_states_and_a_job_may_have_no_name() {
    let server = server();
    answered(&server, "found:1", &sample("shapes.png"), "<OD>");
    answered(&server, "", &sample("shapes.png"), "<OD>");
    server.call::<()>(&["CONFIG", "SET", "florence.paused", "yes"]);
    let waits = ["found:2", &sample("sign.png"), "<OCR>", "BEAMS", "4", "NBEST", "2"];
    server.call::<()>(&[&["FLORENCE.SUBMIT"][..], &waits].concat());
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "jobs"));
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 1");
    browser.write("input[type=search]", "found\u{e007}");
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 2");
    // The same search looks anew.
    server.call::<()>(&["FLORENCE.SUBMIT", "found:3", &sample("sign.png"), "<OCR>"]);
    browser.click(".search button");
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 3");
    // A key that a shell cannot pass.
    server.call::<()>(&["FLORENCE.SUBMIT", "a\n\0\"b", &sample("sign.png"), "<OCR>"]);
    browser.go(&address(&page, &format!("job?server=0&id={}", common::query("a%0A%00\"b"))));
    browser.wait(
        r#"document.querySelector('#cli')?.textContent.includes(`--quoted-input FLORENCE.SUBMIT '"a\\x0A\\x00\\"b:again"' `)"#,
    );
    // It is asked where the job is.
    let connect = format!("redis-cli -p {} --quoted-input", server.port);
    browser.wait(&format!("document.querySelector('#cli').textContent.startsWith('{connect}')"));
    browser.go(&address(&page, "job?server=0&id=found:2"));
    browser.wait("document.querySelector('#cli')?.textContent.includes('found:2:again')");
    browser.wait("document.querySelector('#cli')?.textContent.includes('NBEST 2')");
    browser.go(&address(&page, "job?server=0&id="));
    browser.wait("document.querySelector('#facts')?.innerText.includes('shapes.png')");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn what_has_not_changed_stays_under_the_pointer() {
    let (server, pictures) = (server(), Pictures::serve());
    server.call::<()>(&["FLORENCE.SUBMIT", "waits", &pictures.url("held/back/sign.png"), "<OCR>"]);
    let (page, browser) = (Page::about(&[&server], &[]), window());
    let asked = |path: &str| {
        let script = "performance.getEntriesByType('resource').filter((e) => e.name.includes('PATH')).length >= 4";
        browser.wait(&script.replace("PATH", path));
    };
    for (part, css, path) in [
        ("jobs", ".long-body .long-row .state.fetching", "/api/rows"),
        ("job?server=0&id=waits", "button[data-action=cancel]", "/api/job?"),
    ] {
        browser.go(&address(&page, part));
        browser.wait(&format!("document.querySelector('{css}')"));
        browser.js(&format!(
            "performance.clearResourceTimings(); window.seen = document.querySelector('{css}')"
        ));
        asked(path);
        assert_eq!(browser.js("return window.seen.isConnected"), true, "{css}");
    }
}

#[test]
fn all_keys_are_looked_at_once() {
    let server = server();
    answered(&server, "florence:celery:x", &sample("shapes.png"), "<OD>");
    let (page, browser) = (Page::about(&[&server], &[]), window());
    for (part, details) in
        [("jobs?q=florence&state=all", "/api/rows"), ("celery?all=1", "/api/tasks")]
    {
        browser.go("about:blank");
        browser.go(&address(&page, part));
        let asked = "performance.getEntriesByType('resource').filter((e) => e.name.includes('PATH')).length";
        browser.wait(&format!("{} >= 3", asked.replace("PATH", details)));
        assert_eq!(
            browser.js(&format!("return {}", asked.replace("PATH", "/api/jobs?"))),
            1,
            "{part}"
        );
    }
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn the_marked_row_is_a_job_wherever_it_goes() {
    let server = server();
    for key in ["job:a", "job:b", "job:c"] {
        answered(&server, key, &sample("shapes.png"), "<OD>");
    }
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "jobs?state=done"));
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 3");
    browser.write(".long-scroll", "\u{e015}\u{e015}");
    let is_at = |row: u32| {
        let marked = "document.querySelector('.long-row.at')";
        browser.wait(&format!(
            "{marked}?.innerText.includes('job:b') && {marked}.ariaRowIndex === '{row}'"
        ));
    };
    is_at(2);
    answered(&server, "job:d", &sample("shapes.png"), "<OD>");
    is_at(3);
    // Once it has left the list, nothing is marked.
    server.call::<()>(&["DEL", "job:b"]);
    browser.wait("document.querySelectorAll('.long-body .long-row').length === 3");
    assert_eq!(browser.js("return document.querySelector('.long-row.at')"), Value::Null);
    browser.write(".long-scroll", "\u{e015}");
    browser.wait("document.querySelector('.long-row.at')?.ariaRowIndex === '3'");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn outlines_lie_where_the_answer_says() {
    let server = server();
    let result = json!({ "<OD>": { "bboxes": [[36, 28, 180, 140], [0, 0, 360, 280],
        [36, 28, 180, 200]], "labels": ["a quarter", "", "more"] }});
    forged(&server, "known", &result);
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "job?server=0&id=known"));
    browser.wait("document.querySelector('.stage img')?.naturalWidth === 360");
    // Edges as shares of the picture's width and height.
    let edges = |mark: usize| -> Vec<f64> {
        let found = browser.js(&format!(
            "const stage = document.querySelector('.stage img').getBoundingClientRect();
             const box = document.querySelectorAll('.mark path')[{mark}].getBoundingClientRect();
             return [(box.left - stage.left) / stage.width, (box.top - stage.top) / stage.height,
                 (box.right - stage.left) / stage.width, (box.bottom - stage.top) / stage.height];"
        ));
        serde_json::from_value(found).unwrap()
    };
    for (mark, expected) in [(0, [0.1, 0.1, 0.5, 0.5]), (1, [0.0, 0.0, 1.0, 1.0])] {
        for (found, expected) in edges(mark).into_iter().zip(expected) {
            assert!((found - expected).abs() < 0.01, "{mark}: {found} {expected}");
        }
    }
    // Labels are in the picture, and not one over the other.
    let labels = browser.js(
        "const stage = document.querySelector('.stage').getBoundingClientRect();
         return [...document.querySelectorAll('.label')].map((label) => {
             const [box, text] = [...label.children].map((part) => part.getBoundingClientRect());
             return [box.top - stage.top, box.bottom - stage.top, text.left - box.left, box.right - text.right];
         });",
    );
    let labels: Vec<[f64; 4]> = serde_json::from_value(labels).unwrap();
    let [first, second] = labels[..] else { panic!("{labels:?}") };
    assert!(first[1] <= second[0] || second[1] <= first[0], "{labels:?}");
    assert!(labels.iter().flatten().all(|edge| *edge > -1.0), "{labels:?}");
    // List and outline light up together.
    browser.js("document.querySelector('.found li').focus()");
    let lit =
        browser.js("return [...document.querySelectorAll('.lit')].map((e) => e.dataset.mark)");
    assert_eq!(lit, json!(["0", "0"]));
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn a_chain_is_shown_with_its_steps() {
    let server = server();
    let steps = ["EACH", "<REGION_TO_SEGMENTATION>", "CROP", "<OCR>", "MARGIN", "5"];
    let submit = ["FLORENCE.SUBMIT", "chain", &sample("shapes.png"), "<OD>"];
    server.call::<()>(&[&submit[..], &steps].concat());
    server.call::<redis::Value>(&["FLORENCE.WAIT", "chain", "60"]);
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "job?server=0&id=chain"));
    browser.wait("document.querySelectorAll('.mark').length >= 6");
    browser.wait("document.querySelector('#job').innerText.includes('EACH <REGION_TO_SEG')");
    browser.js("for (const one of document.querySelectorAll('details')) one.open = true");
    browser.wait(
        "document.querySelector('#cli').innerText.includes(\"EACH '<REGION_TO_SEGMENTATION>' CROP '<OCR>'\")",
    );
    browser.wait("document.querySelector('#cli').innerText.includes('MARGIN 5')");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn attempts_are_listed_with_their_errors() {
    let (server, pictures) = (server(), Pictures::serve());
    server.call::<()>(&["CONFIG", "SET", "florence.retry-delay-ms", "1"]);
    answered(&server, "again", &pictures.url("flaky/2/shapes.png"), "<OD>");
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "job?server=0&id=again"));
    browser.wait("document.querySelectorAll('#attempts dd').length === 2");
    browser.wait("document.querySelector('#attempts').innerText.includes('FETCH: ')");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn texts_of_jobs_are_never_html() {
    const HOSTILE: &str = "<img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>";
    let server = server();
    let result = json!({ "<OD>": { "bboxes": [[36, 28, 180, 140]], "labels": [HOSTILE] },
        HOSTILE: HOSTILE });
    let key = format!("k:{HOSTILE}");
    forged(&server, &key, &result);
    server.call::<()>(&[
        "HSET", &key, "prompt", HOSTILE, "text", HOSTILE, "user", HOSTILE, "image", HOSTILE,
        "model", HOSTILE,
    ]);
    let failed = format!("f:{HOSTILE}");
    forged(&server, &failed, &json!({}));
    let errors = json!([{ "attempt": 1, "at": 0, "code": HOSTILE, "message": HOSTILE }]);
    server.call::<()>(&["HSET", &failed, "errors", &errors.to_string()]);
    server.call::<()>(&[
        "HSET",
        &failed,
        "state",
        "failed",
        "error_code",
        HOSTILE,
        "error",
        HOSTILE,
    ]);
    let (page, browser) = (Page::about(&[&server], &[]), window());
    let check = |shown: &str| {
        browser.wait(&format!("document.body.innerText.includes({})", json!(shown)));
        let state = browser.js("return [window.pwned ?? 0, document.querySelectorAll('img[src=x], main script').length]");
        assert_eq!(state, json!([0, 0]));
    };
    for state in ["done", "failed"] {
        browser.go(&address(&page, &format!("jobs?state={state}&all=1")));
        check(HOSTILE);
    }
    for id in [key, failed] {
        browser.go(&address(&page, &format!("job?server=0&id={}", common::query(&id))));
        browser.wait("document.querySelector('#facts')");
        browser.js("for (const one of document.querySelectorAll('details')) one.open = true");
        check(HOSTILE);
    }
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn ten_thousand_jobs_do_not_stall_the_list() {
    const JOBS: usize = 10_000;
    let server = server();
    let mut pipe = redis::pipe();
    for i in 0..JOBS {
        pipe.cmd("FLORENCE.SUBMIT")
            .arg(format!("late:{i:05}"))
            .arg(sample("sign.png"))
            .arg("<OCR>")
            .arg("DELAY")
            .arg(3_600_000)
            .ignore();
    }
    pipe.exec(&mut server.connect()).unwrap();
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "jobs?all=1"));
    browser.wait("document.querySelector('#note')?.innerText.includes('10,000 jobs')");
    // Every frame while somebody scrolls from one end to the other, and what exists meanwhile.
    browser.js("window.frames_ = []; window.rows_ = 0;
         const list = document.querySelector('.long-scroll');
         const end = list.scrollHeight - list.clientHeight;
         let step = 0; let last = performance.now();
         const frame = (now) => {
             window.frames_.push(now - last); last = now;
             window.rows_ = Math.max(window.rows_, document.querySelectorAll('.long-row').length);
             step += 1; list.scrollTop = end * step / 100;
             if (step < 100) requestAnimationFrame(frame); else window.done_ = true;
         };
         requestAnimationFrame(frame);");
    browser.wait("window.done_");
    let worst = browser.js("return Math.max(...window.frames_)").as_f64().unwrap();
    let rows = browser.js("return window.rows_").as_u64().unwrap();
    assert!(worst < 1000.0, "a frame took {worst} ms");
    assert!((5..120).contains(&rows), "{rows} rows exist");
    // Details of what is in sight come, and nothing is left out at the end.
    browser.wait("[...document.querySelectorAll('.long-body .long-row')].at(-1)?.innerText.includes('<OCR>')");
    let last = browser.js("return document.querySelector('[role=table]').ariaRowCount");
    assert_eq!(last, "10000");
    // The cursor goes to the end, and is there again for who comes back from a job.
    let is_last = "document.querySelector('.long-row.at')?.ariaRowIndex === '10000'";
    browser.js("document.querySelector('.long-scroll').scrollTop = 0");
    browser.write(".long-scroll", "\u{e010}");
    browser.wait(is_last);
    browser.write(".long-scroll", "\u{e007}");
    browser.wait("document.querySelector('#facts')");
    browser.js("history.back()");
    browser.wait(is_last);
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn the_page_finds_its_server_again() {
    let mut server = server();
    let port = florence_tests::free_port();
    let listen = format!("127.0.0.1:{port}");
    let page = Page::about(&[&server], &["--listen", &listen]);
    let browser = window();
    browser.go(&address(&page, "overview"));
    browser.wait("document.querySelector('#servers')?.innerText.includes('tiny (ready)')");
    server.shut_down(&["NOSAVE"]);
    browser.wait("!document.querySelector('#lost').hidden");
    browser.wait("document.querySelector('#servers').innerText.includes('away')");
    server.restart();
    browser.wait("document.querySelector('#lost').hidden");
    browser.wait("document.querySelector('#servers').innerText.includes('tiny (ready)')");
    drop(page);
    browser.wait("document.querySelector('#lost').innerText.includes('trying again')");
    let _page = Page::about(&[&server], &["--listen", &listen]);
    browser.wait("document.querySelector('#lost').hidden");
    browser.wait("document.querySelector('#servers').innerText.includes('tiny (ready)')");
}

#[test]
fn a_picture_is_dropped_and_its_answers_are_drawn() {
    let server = server();
    let (page, browser) = (Page::about(&[&server], &[]), window());
    browser.go(&address(&page, "try"));
    browser.write("#file", &sample("shapes.png"));
    browser.wait("document.querySelector('#result img')?.naturalWidth === 360");
    browser.click(".try button.main");
    browser.wait("document.querySelectorAll('#result .mark').length === 3");
    browser.wait("document.querySelector('#result .text')?.innerText.includes('a blue circle')");
    let labels =
        browser.js("return [...document.querySelectorAll('.found span')].map((e) => e.innerText)");
    assert_eq!(labels, json!(["circle", "square", "triangle"]));
    // The picture stays under its marks.
    browser.wait("document.querySelector('#result .stage img')?.naturalWidth === 360");
    // A path of the server's own is as good.
    browser.write("[inputmode=url]", &sample("sign.png"));
    browser.click(".try button.main");
    browser.wait("document.querySelector('#result .text')?.innerText.includes('the word EXIT')");
    // The blank opens the field, once.
    browser.js("document.querySelector('#file').click = () => { window.opened_ = (window.opened_ ?? 0) + 1 }");
    browser.write(".drop", " ");
    assert_eq!(browser.js("return window.opened_"), 1);
    assert_eq!(browser.console(), [""; 0]);
}

/// What the browser makes of a file is not what the model sees: it turns a phone's picture, and knows
/// no TIFF.
#[test]
fn a_picture_that_is_tried_is_drawn_as_the_model_saw_it() {
    let server = Server::ready(&["florence.image-formats jpeg tiff"]);
    let (page, browser) = (Page::about(&[&server], &[]), window());
    let directory = tempfile::tempdir().unwrap();
    for (name, file) in [("phone.jpg", turned()), ("plain.tif", tiff(640, 480))] {
        let path = directory.path().join(name);
        std::fs::write(&path, file).unwrap();
        browser.go("about:blank");
        browser.go(&address(&page, "try"));
        browser.write("#file", &path.display().to_string());
        browser.click(".try button.main");
        browser.wait("document.querySelector('#result .stage img')?.src.includes('/api/picture')");
        browser.wait("document.querySelector('#result .stage img').naturalWidth === 640");
        browser.wait("document.querySelector('#result .stage img').naturalHeight === 480");
        browser.wait("document.querySelector('.marks').viewBox.baseVal.width === 640");
    }
    assert_eq!(browser.console(), [""; 0]);
}

/// A picture of 640 by 480 whose tag says that it is to be turned by a quarter.
fn turned() -> Vec<u8> {
    let tag = b"\xff\xe1\0\x22Exif\0\0II*\0\x08\0\0\0\x01\0\
        \x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let mut file = std::fs::read(picture("poster.jpg")).unwrap();
    file.splice(2..2, *tag);
    file
}

/// A black picture in grey, as a TIFF without compression.
fn tiff(width: u16, height: u16) -> Vec<u8> {
    let pixels = vec![0; usize::from(width) * usize::from(height)];
    let bytes = u32::try_from(pixels.len()).unwrap();
    let (width, height) = (u32::from(width), u32::from(height));
    let tags = [
        (256_u16, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, bytes),
    ];
    let mut file = [&b"II*\0"[..], &(8 + bytes).to_le_bytes(), &pixels, b"\x09\0"].concat();
    for (tag, value) in tags {
        file.extend([tag.to_le_bytes(), 4_u16.to_le_bytes()].concat());
        file.extend([1_u32.to_le_bytes(), value.to_le_bytes()].concat());
    }
    file.extend([0; 4]);
    file
}

#[test]
fn one_of_several_servers_is_chosen() {
    let (one, other) = (server(), server());
    answered(&one, "of:one", &sample("shapes.png"), "<OD>");
    answered(&other, "of:other", &sample("shapes.png"), "<OD>");
    let (page, browser) = (Page::about(&[&one, &other], &[]), window());
    browser.go(&address(&page, "overview"));
    browser.wait("document.querySelectorAll('#servers .server').length === 2");
    browser.wait("document.querySelector('#numbers dd')?.innerText === '2'");
    browser.go(&address(&page, "jobs?state=done"));
    browser.wait("document.querySelectorAll('.long-body .state.done').length === 2");
    browser.click("#server option:nth-of-type(3)");
    browser.wait("document.querySelectorAll('.long-body .state.done').length === 1");
    browser.wait("document.querySelector('.long-body').innerText.includes('of:other')");
    browser.click("#pages a:nth-of-type(1)");
    browser.wait("document.querySelector('#numbers dd')?.innerText === '1'");
    // The address says which: for who loads it anew, and for who gets it.
    let shown = browser.js("return location.href");
    for address in [shown.as_str().unwrap(), &address(&page, "jobs?state=done&only=1")] {
        browser.go("about:blank");
        browser.go(address);
        browser.wait("document.querySelector('#server')?.value === '1'");
    }
    browser.wait("document.querySelectorAll('.long-body .state.done').length === 1");
    browser.go(&address(&page, "jobs?state=done"));
    browser.wait("document.querySelectorAll('.long-body .state.done').length === 2");
    assert_eq!(browser.console(), [""; 0]);
}

#[test]
fn a_password_opens_the_page_and_leaving_closes_it() {
    let (server, directory) = (server(), tempfile::tempdir().unwrap());
    let file = directory.path().join("password");
    std::fs::write(&file, "correct horse").unwrap();
    let page = Page::about(&[&server], &["--password-file", &file.display().to_string()]);
    let browser = window();
    browser.go(&address(&page, "jobs"));
    browser.write("#password", "wrong\u{e007}");
    browser.wait("document.querySelector('#problem').innerText.includes('wrong')");
    browser.write("#password", "correct horse\u{e007}");
    browser.wait("document.querySelector('.tabs')");
    assert_eq!(browser.js("return document.cookie"), "", "no script can read the cookie");
    browser.click("#logout");
    browser.wait("document.querySelector('#password')");
}

#[test]
fn narrow_windows_and_both_themes_show_all() {
    let server = server();
    let longest = "<REFERRING_EXPRESSION_SEGMENTATION>";
    answered(&server, "job:1", &sample("shapes.png"), &format!("{longest}a black triangle"));
    let page = Page::about(&[&server], &[]);
    let browser = Browser::start(400, 800);
    let has =
        |part: &str| format!("document.querySelector('{part}')?.innerText.includes('REFERRING')");
    for (part, is_there) in [
        ("overview", format!("{} && {}", has("#latency"), has("#ends"))),
        ("jobs?state=done", has(".long-body")),
        ("job?server=0&id=job:1", has("#job")),
        ("try", has("main")),
        ("celery", "document.querySelector('h1')".to_owned()),
    ] {
        browser.go(&address(&page, part));
        browser.wait(&is_there);
        browser.wait("document.documentElement.scrollWidth <= window.innerWidth");
    }
    let paper = || browser.js("return getComputedStyle(document.body).backgroundColor");
    let before = paper();
    browser.click("#theme");
    assert_ne!(paper(), before);
    browser.go(&address(&page, "overview"));
    browser.js("location.reload()");
    browser.wait("document.querySelector('h1')");
    assert_ne!(paper(), before, "the choice is kept");
}

/// Writes pictures of every part, in both themes, into the directory that `FLORENCE_SCREENSHOTS` names
/// (`make screenshots`), else into one that is thrown away.
#[test]
fn pictures_of_the_page_can_be_taken() {
    let kept = std::env::var("FLORENCE_SCREENSHOTS").map(PathBuf::from);
    let thrown = tempfile::tempdir().unwrap();
    let directory = kept.unwrap_or_else(|_| thrown.path().to_owned());
    let points = if std::env::var("FLORENCE_SCREENSHOTS").is_ok() { 9 } else { 1 };
    let (server, pictures) = (server(), Pictures::serve());
    let (page, browser) = (Page::about(&[&server], &[]), Browser::start(1280, 1280));
    let mut names = ["shapes.png", "sign.png", "poster.jpg", "tall.png"].iter().cycle().enumerate();
    eventually("there are enough points for charts", || {
        for (i, name) in names.by_ref().take(4) {
            let tasks = ["<OD>", "<CAPTION>", "<OCR_WITH_REGION>", "<DENSE_REGION_CAPTION>"];
            answered(&server, &format!("photo:{i:04}"), &pictures.url(name), tasks[i / 4 % 4]);
        }
        let away = format!("lost:{}", server.stat("jobs_failed"));
        server.call::<()>(&["FLORENCE.SUBMIT", &away, &pictures.url("status/404"), "<OD>"]);
        server.call::<redis::Value>(&["FLORENCE.WAIT", &away, "30"]);
        let history = page.get("/api/history").json();
        let is_enough = history["points"].as_array().unwrap().len() >= points;
        (is_enough && server.stat("jobs_done") >= 12).then_some(())
    });
    let asked =
        ["<OD>", "<DETAILED_CAPTION>", "<REFERRING_EXPRESSION_SEGMENTATION>a black triangle"];
    let url = pictures.url("shapes.png");
    let submit = ["FLORENCE.SUBMIT", "shapes", &url, "PROMPTS", "3"];
    server.call::<()>(&[&submit[..], &asked, &["NOCACHE", "THUMBNAIL", "720"]].concat());
    server.call::<redis::Value>(&["FLORENCE.WAIT", "shapes", "60"]);
    let message = celery_message("id-1", "tasks.ask", &[&sample("sign.png"), "<OCR>"]);
    server.call::<()>(&["LPUSH", "celery", &message]);
    for (name, part, is_there) in [
        ("overview", "overview", "document.querySelector('#ends meter')"),
        (
            "jobs",
            "jobs?state=done&all=1",
            "document.querySelectorAll('.long-body .state.done').length > 8",
        ),
        ("job", "job?server=0&id=shapes", "document.querySelector('.stage img')?.complete"),
        ("try", "try", "document.querySelectorAll('.task').length === 15"),
        ("celery", "celery", "document.querySelector('.long-body')?.innerText.includes('id-1')"),
    ] {
        browser.go(&address(&page, part));
        browser.wait(is_there);
        browser.wait("document.querySelector('#lost').hidden");
        for theme in ["light", "dark"] {
            browser.js(&format!("document.documentElement.dataset.theme = '{theme}'"));
            let png = browser.screenshot();
            let picture = image::load_from_memory(&png).unwrap();
            assert!(picture.width() > 1000, "{name}");
            std::fs::write(directory.join(format!("{name}-{theme}.png")), png).unwrap();
        }
    }
}
