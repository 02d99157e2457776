//! `florence agree` on the sample pictures: precisions that this machine has and such that nobody has.

mod labels;

use florence_tests::picture;
use labels::{florence, text};
use tempfile::tempdir;

#[test]
fn precisions_are_compared_in_a_table_and_on_a_page() {
    let directory = tempdir().unwrap();
    std::fs::write(directory.path().join("broken.png"), "hello").unwrap();
    let samples = picture("shapes.png").parent().unwrap().display().to_string();
    let mut agree = florence(&["agree", &samples, "broken.png", "--precisions", "f32,auto"]);
    agree.args(["--task", "<OD>", "--task", "<CAPTION>"]);
    let output = agree.current_dir(&directory).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{err}");
    assert!(err.contains("broken.png: not a picture"), "{err}");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split("  ").collect()).collect();
    assert!(rows[0][0].starts_with("precision"), "{out}");
    // Float32, then itself, then what is fastest here.
    let same = out.lines().nth(2).unwrap();
    assert!(same.starts_with("f32 ") && same.matches("100.0 %").count() == 3, "{out}");
    assert!(same.contains(" 1.0000 ") && same.contains("  8  "), "{out}");
    assert!(out.lines().nth(3).unwrap().starts_with("auto "), "{out}");
    assert!(out.lines().nth(4).unwrap().ends_with("agree.html"), "{out}");
    let page = std::fs::read_to_string(directory.path().join("agree.html")).unwrap();
    assert!(page.contains("<h2>f32</h2>\n<p>All answers have the same tokens.</p>"), "{page}");
    assert!(page.contains("<code>&lt;OD&gt;</code>"));
}

#[test]
fn without_a_picture_or_a_precision_there_is_nothing_to_compare() {
    let directory = tempdir().unwrap();
    std::fs::write(directory.path().join("broken.png"), "hello").unwrap();
    std::fs::copy(picture("sign.png"), directory.path().join("a.png")).unwrap();
    std::fs::write(directory.path().join("list.txt"), "a.png\n").unwrap();
    for (args, told) in [
        (&["nowhere.png"][..], "there is no nowhere.png"),
        (&["broken.png"], "there is no picture to ask about"),
        (&["broken.png", "--precisions", "f32,f8"], "unknown precision 'f8'"),
        (&["a.png", "--out", "./a.png"], "./a.png would be written over: it is read"),
        (&["list.txt", "--out", "list.txt"], "list.txt would be written over: it is read"),
        (&["a.png", "--beams", "1", "--length-penalty", "2"], "is for several beams"),
    ] {
        let output = florence(&["agree"]).args(args).current_dir(&directory).output().unwrap();
        let err = text(&output.stderr);
        assert!(!output.status.success() && err.contains(told), "{err}");
    }
    assert!(!directory.path().join("agree.html").exists());
}
