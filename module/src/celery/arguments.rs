//! What a task is called with, bound to its parameters as Python binds them. Pure.

use serde_json::Value;

use super::{json, message::Call, result::Exception};
use crate::settings::Parameters;

/// Where the picture is, and the prompt.
pub(super) struct Arguments {
    pub(super) picture: String,
    pub(super) prompt: String,
}

/// Binds a call to the parameters of its task.
pub(super) fn bind(
    task: &str,
    parameters: &Parameters,
    call: &Call,
) -> Result<Arguments, Exception> {
    let function = task.rsplit('.').next().unwrap_or(task);
    let wrong = |problem: String| Exception::new("builtins", "TypeError", problem);
    check(parameters, call).map_err(|problem| wrong(format!("{function}() {problem}")))?;
    let text = |index: usize, default: Option<&String>| {
        let name = &parameters.names[index];
        match call.args.get(index).or_else(|| call.kwargs.get(name)) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(wrong(format!("{name} must be a string"))),
            None => Ok(default.cloned().unwrap_or_default()),
        }
    };
    let picture = text(parameters.picture, None)?;
    let prompt = text(parameters.prompt, parameters.default_prompt.as_ref())?;
    // The name of a file may have them.
    let is_path = picture.starts_with('/') || picture.starts_with("file:///");
    for (index, has_half) in [
        (parameters.picture, json::has_half(&picture, !is_path)),
        (parameters.prompt, json::has_half(&prompt, true)),
    ] {
        if has_half {
            let text =
                format!("{} is no valid text: it has a lone surrogate", parameters.names[index]);
            return Err(Exception::new("builtins", "ValueError", text));
        }
    }
    Ok(Arguments { picture, prompt })
}

/// What Python has against a call; in its order, and in its words after the function's name.
fn check(parameters: &Parameters, call: &Call) -> Result<(), String> {
    let Parameters { names, .. } = parameters;
    let index = |name: &String| names.iter().position(|known| known == name);
    for name in call.kwargs.keys() {
        match index(name) {
            None => return Err(format!("got an unexpected keyword argument '{name}'")),
            Some(index) if index < call.args.len() => {
                return Err(format!("got multiple values for argument '{name}'"));
            }
            Some(_) => {}
        }
    }
    let needed: Vec<&String> = (0..names.len())
        .filter(|index| parameters.is_needed(*index))
        .map(|index| &names[index])
        .collect();
    let (most, given) = (names.len(), call.args.len());
    if given > most {
        let least = needed.len();
        let range = if least < most { format!("from {least} to ") } else { String::new() };
        return Err(format!("takes {range}{most} positional arguments but {given} were given"));
    }
    let missing: Vec<String> = needed
        .into_iter()
        .filter(|name| index(name).is_some_and(|index| index >= given))
        .filter(|name| !call.kwargs.contains_key(*name))
        .map(|name| format!("'{name}'"))
        .collect();
    match missing.as_slice() {
        [] => Ok(()),
        [name] => Err(format!("missing 1 required positional argument: {name}")),
        names => {
            let (count, names) = (names.len(), names.join(" and "));
            Err(format!("missing {count} required positional arguments: {names}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    use crate::settings::Signatures;

    /// The picture and the prompt of a call, or what is wrong with it.
    fn bound(signature: &str, args: Value, kwargs: Value) -> Result<[String; 2], String> {
        let signatures: Signatures = signature.parse().unwrap();
        let (Value::Array(args), Value::Object(kwargs)) = (args, kwargs) else { unreachable!() };
        bind("app.f", signatures.of("app.f"), &Call { args, kwargs })
            .map(|Arguments { picture, prompt }| [picture, prompt])
            .map_err(|exception| exception.repr())
    }

    #[test]
    fn arguments_are_bound_as_python_binds_them() {
        let both = Ok(["a".to_owned(), "b".to_owned()]);
        for (signature, args, kwargs) in [
            ("", json!(["a", "b"]), json!({})),
            ("", json!(["a"]), json!({"task_prompt": "b"})),
            ("", json!([]), json!({"task_prompt": "b", "url": "a"})),
            ("(image_url, prompt)", json!(["a"]), json!({"prompt": "b"})),
            ("(image_url, prompt=b)", json!(["a"]), json!({})),
            ("(image_url, prompt=c)", json!(["a", "b"]), json!({})),
            ("(ask:prompt, path:picture, user)", json!(["b", "a", 7]), json!({})),
            ("(ask:prompt, path:picture, user)", json!([]), json!({"ask": "b", "path": "a"})),
            ("(user=None, path:picture, ask:prompt)", json!([7, "a", "b"]), json!({})),
            ("g(x, y) app.f(image, question)", json!(["a"]), json!({"question": "b"})),
        ] {
            assert_eq!(bound(signature, args, kwargs), both, "{signature}");
        }
    }

    #[test]
    fn wrong_calls_get_pythons_words() {
        let two = "(url, task_prompt)";
        for (signature, args, kwargs, error) in [
            (
                two,
                json!(["a"]),
                json!({}),
                "f() missing 1 required positional argument: 'task_prompt'",
            ),
            (
                two,
                json!([]),
                json!({}),
                "f() missing 2 required positional arguments: 'url' and 'task_prompt'",
            ),
            (
                two,
                json!(["a", "b", "c"]),
                json!({}),
                "f() takes 2 positional arguments but 3 were given",
            ),
            (
                "(a, b=c, d)",
                json!([1, 2, 3, 4]),
                json!({}),
                "f() takes from 1 to 3 positional arguments but 4 were given",
            ),
            (two, json!(["a"]), json!({"url": "a"}), "f() got multiple values for argument 'url'"),
            (two, json!([]), json!({"x": 1}), "f() got an unexpected keyword argument 'x'"),
            (two, json!([1, "b"]), json!({}), "url must be a string"),
            ("(a, b=c)", json!(["a", null]), json!({}), "b must be a string"),
        ] {
            assert_eq!(
                bound(signature, args, kwargs).unwrap_err(),
                format!("TypeError({})", Value::from(error))
            );
        }
    }

    #[test]
    fn only_names_of_files_may_be_no_text() {
        let [byte, other] = ["\u{10fc80}", "\u{10f800}"];
        let is_taken =
            |picture: String, prompt: &str| bound("", json!([picture, prompt]), json!({})).is_ok();
        assert!(is_taken(format!("/a/{byte}.png"), "b"));
        assert!(is_taken(format!("file:///a/{byte}.png"), "b"));
        assert!(!is_taken(format!("/a/{other}.png"), "b"));
        assert!(!is_taken(format!("http://a/{byte}.png"), "b"));
        assert!(!is_taken("/a".to_owned(), byte));
    }
}
