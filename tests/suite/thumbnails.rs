//! Small copies of the pictures: who gets one, how large it is, and who does not see it.

use std::{collections::HashMap, time::Duration};

use florence_tests::{Pictures, Server, eventually, picture};

type Job = HashMap<String, Option<String>>;

fn submit(server: &Server, key: &str, url: &str, rest: &[&str]) -> Job {
    server.call::<()>(&[&["FLORENCE.SUBMIT", key, url, "<OCR>"], rest].concat());
    let job: Option<Job> = server.call(&["FLORENCE.WAIT", key, "30"]);
    job.unwrap_or_else(|| panic!("{key} does not end: {:?}", server.job(key)))
}

fn thumbnail(server: &Server, key: &str) -> Option<Vec<u8>> {
    server.call(&["HGET", key, "thumbnail"])
}

/// Width and height of a JPEG, by its frame header.
fn size(jpeg: &[u8]) -> (usize, usize) {
    assert_eq!(&jpeg[..2], [0xff, 0xd8], "no JPEG");
    let number = |at: usize| usize::from(u16::from_be_bytes(jpeg[at..at + 2].try_into().unwrap()));
    let mut at = 2;
    while !(0xc0..=0xc2).contains(&jpeg[at + 1]) {
        at += 2 + number(at + 2);
    }
    (number(at + 7), number(at + 5))
}

/// Width and height of a thumbnail, as its job tells the picture's own.
fn expected(job: &Job, side: usize) -> (usize, usize) {
    let number = |field: &str| job[field].as_deref().unwrap().parse::<usize>().unwrap();
    let (width, height) = (number("width"), number("height"));
    let longer = width.max(height);
    let scaled = |length: usize| ((length * side + longer / 2) / longer).max(1);
    (scaled(width), scaled(height))
}

#[test]
fn a_job_gets_a_thumbnail_as_large_as_its_option_or_the_setting_says() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    let url = pictures.url("poster.jpg");
    submit(&server, "by default", &url, &[]);
    assert_eq!(thumbnail(&server, "by default"), None);
    let job = submit(&server, "option", &url, &["THUMBNAIL", "48"]);
    assert_eq!(size(&thumbnail(&server, "option").unwrap()), expected(&job, 48));
    server.call::<()>(&["CONFIG", "SET", "florence.thumbnails", "100"]);
    // The answer is known by now: the picture is looked at all the same.
    let job = submit(&server, "setting", &url, &[]);
    assert_eq!(job["cache"].as_deref(), Some("result"));
    assert_eq!(size(&thumbnail(&server, "setting").unwrap()), expected(&job, 100));
    let features = ["THUMBNAIL", "1024", "BEAMS", "1"];
    let job = submit(&server, "features", &url, &features);
    assert_eq!(job["cache"].as_deref(), Some("features"));
    // A picture is not made larger.
    let longer = job["width"].clone().max(job["height"].clone()).unwrap().parse().unwrap();
    assert_eq!(size(&thumbnail(&server, "features").unwrap()), expected(&job, longer));
    submit(&server, "none", &url, &["THUMBNAIL", "0"]);
    assert_eq!(thumbnail(&server, "none"), None);
    submit(&server, "no picture", &pictures.url("text"), &[]);
    assert_eq!(thumbnail(&server, "no picture"), None);
    // A job whose bytes came along has one when they are gone.
    let mut submit = redis::cmd("FLORENCE.SUBMIT");
    submit.arg("data").arg("DATA").arg(std::fs::read(picture("shapes.png")).unwrap());
    submit.arg("<OD>").exec(&mut server.connect()).unwrap();
    let job: Job = server.call(&["FLORENCE.WAIT", "data", "30"]);
    assert_eq!(size(&thumbnail(&server, "data").unwrap()), expected(&job, 100));
    let refused = server.error(&["FLORENCE.SUBMIT", "j", &url, "<OD>", "THUMBNAIL", "1025"]);
    assert_eq!(refused, "ERR THUMBNAIL is not an integer from 0 to 1024");
}

#[test]
fn a_thumbnail_is_in_the_hash_and_nowhere_else() {
    let lines = ["florence.thumbnails 64", "florence.stream ended", "appendonly yes"];
    let (mut server, pictures) = (Server::ready(&lines), Pictures::serve());
    let replica = Server::start();
    replica.follow(&server);
    let mut connection = server.connect();
    let mut subscriber = connection.as_pubsub();
    subscriber.psubscribe("florence:*").unwrap();
    subscriber.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let job = submit(&server, "job", &pictures.url("shapes.png"), &[]);
    assert!(!job.contains_key("thumbnail"), "{job:?}");
    let bytes = thumbnail(&server, "job").unwrap();
    let message: String = subscriber.get_message().unwrap().get_payload().unwrap();
    let entries: Vec<(String, HashMap<String, String>)> =
        server.call(&["XRANGE", "ended", "-", "+"]);
    for told in [&message, &entries[0].1["job"]] {
        assert!(told.contains("\"state\":\"done\"") && !told.contains("thumbnail"), "{told}");
    }
    eventually("the replica has it", || {
        (thumbnail(&replica, "job").as_ref() == Some(&bytes)).then_some(())
    });
    server.shut_down(&[]);
    server.restart();
    assert_eq!(thumbnail(&server, "job").as_ref(), Some(&bytes));
}

#[test]
fn a_job_that_is_answered_again_has_no_thumbnail_of_another_picture() {
    let (server, pictures) = (Server::ready(&[]), Pictures::serve());
    submit(&server, "job", &pictures.url("poster.jpg"), &["THUMBNAIL", "32"]);
    let old = thumbnail(&server, "job").unwrap();
    for (side, has_one) in [("32", true), ("0", false)] {
        let url = pictures.url("shapes.png");
        let fields = ["image", &url, "thumbnail_px", side, "state", "queued"];
        server.call::<()>(&[&["HSET", "job"], &fields[..]].concat());
        eventually("it is done again", || (server.state("job") == "done").then_some(()));
        let new = thumbnail(&server, "job");
        assert!(new.is_some() == has_one && new.as_ref() != Some(&old), "{side}: {new:?}");
    }
}
