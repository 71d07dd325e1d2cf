use super::*;

fn reader() -> Reader<'static> {
    let sampling = SamplingParams { temperature: 0.5, top_k: 3, top_p: 0.9, min_p: 0.1, seed: 40 };
    let defaults = Defaults { max_new_tokens: 32, sampling, ignore_eos: false, ..Defaults::default() };
    Reader { defaults, eos: vec![7, 8], text: Err("no tokenizer here".into()) }
}

fn read(line: &[u8]) -> Result<Asked, Fault> {
    reader().read(3, 2, line)
}

#[test]
fn what_a_line_leaves_out_is_the_command_lines() {
    let Asked { id, request, stop } = read(br#"{"tokens": [1, 2]}"#).unwrap();
    assert_eq!((id, stop.len()), (None, 0));
    let sampling = SamplingParams { seed: 42, ..reader().defaults.sampling };
    assert_eq!(
        request,
        Request { id: 0, prompt: vec![1, 2], max_new_tokens: 32, eos: vec![7, 8], sampling, session: None }
    );
}

#[test]
fn a_line_may_say_everything() {
    let line = br#"{"id": [1], "tokens": [], "max_new_tokens": 0, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0,
        "seed": 18446744073709551615, "ignore_eos": true, "stop": []}"#;
    let Asked { id, request, .. } = read(line).unwrap();
    assert_eq!(id.as_deref(), Some("[1]"));
    let sampling = SamplingParams { seed: u64::MAX, ..SamplingParams::default() };
    assert_eq!(request, Request { id: 0, prompt: vec![], max_new_tokens: 0, eos: vec![], sampling, session: None });
}

#[test]
fn a_bad_line_says_where_and_why() {
    let cases: [(&[u8], &str); 22] = [
        (b"nonsense", "line 3: expected an object such as {\"tokens\": [5, 17, 3]}, found `nonsense`"),
        (b"[[1, 2]]", "line 3: expected an object"),
        (br#""text""#, "line 3: expected an object"),
        (b"{\"tokens\": [1]\xff}", "line 3, byte 15: expected UTF-8, found 0xff"),
        (b"{\"tokens\": [1]", "line 3, column 14: EOF"),
        (br#"{"tokens": [1]} {}"#, "line 3, column 17: trailing characters"),
        (br#"{"tokenz": [1]}"#, "line 3, column 9: unknown field `tokenz`, expected one of `id`, `tokens`"),
        (br#"{"tokens": [1], "tokens": [2]}"#, "line 3, column 24: duplicate field `tokens`"),
        (br#"{"tokens": [-1]}"#, "line 3, column 14: invalid value: integer `-1`, expected u32"),
        (br#"{"tokens": [4294967296]}"#, "expected u32"),
        (br#"{"tokens": "1,2"}"#, "expected a sequence"),
        (br#"{"tokens": [1], "seed": -1}"#, "expected u64"),
        (br#"{"prompt": "\ud800"}"#, "line 3, column"),
        (b"{}", "line 3: expected one of `tokens`, `prompt` and `messages`, found none"),
        (br#"{"tokens": [1], "prompt": "a"}"#, "found more"),
        (br#"{"messages": []}"#, "expected at least 1 message"),
        (br#"{"messages": [{"role": "user"}]}"#, "missing field `content`"),
        (br#"{"prompt": "a"}"#, "line 3: prompt: no tokenizer here"),
        (br#"{"messages": [{"role": "user", "content": "a"}]}"#, "line 3: messages: no tokenizer here"),
        (br#"{"tokens": [1], "stop": "a"}"#, "line 3: stop: no tokenizer here"),
        (br#"{"tokens": [1], "stop": ["a", ""]}"#, r#"none of them empty, found ["a",""]"#),
        (br#"{"tokens": [1], "stop": 5}"#, "stop: expected a text or a list of texts"),
    ];
    for (line, expected) in cases {
        let fault = read(line).unwrap_err();
        assert!(fault.what.starts_with("line 3") && fault.what.contains(expected), "{}", fault.what);
        assert!(!fault.what.contains("at line 1"), "{}", fault.what);
    }
    for (field, value) in [("temperature", "-1"), ("temperature", "1e40"), ("top_p", "1.5"), ("min_p", "-0.1")] {
        let fault = read(format!("{{\"tokens\": [1], \"id\": 6, \"{field}\": {value}}}").as_bytes()).unwrap_err();
        assert!(fault.what.contains(&format!("line 3: {field}: expected a number")), "{}", fault.what);
        assert_eq!(fault.id.as_deref(), Some("6"), "the id is known");
    }
    let slip = read(br#"{"id": "x", "tokenz": 1}"#).unwrap_err();
    assert_eq!(slip.id.as_deref(), Some("\"x\""), "also of a line with a slip");
    assert_eq!(read(b"[5]").unwrap_err().id, None);
}

#[test]
fn a_name_is_what_is_written() {
    for id in
        ["null", "340282366920938463463374607431768211455", "1.50", "-0", "1e400", "{\"a\": [1,  2]}", "\"\\u00e9\""]
    {
        let line = format!("{{\"tokens\": [1], \"id\": {id}}}");
        assert_eq!(read(line.as_bytes()).unwrap().id.as_deref(), Some(id));
    }
    assert_eq!(read(b"{\"id\": [1,\r2], \"tokens\": [1]}").unwrap().id.as_deref(), Some("[1, 2]"));
}

#[test]
fn keys_tell_requests_apart() {
    let asked = |line: &str| read(line.as_bytes()).unwrap();
    let line = r#"{"tokens": [1, 2]}"#;
    let base = key("plan", 2, line.as_bytes(), Some(&asked(line)));
    assert_eq!(base, key("plan", 2, line.as_bytes(), Some(&asked(line))));
    assert_eq!(base.len(), 16);
    let other = Asked { request: Request { eos: vec![], ..asked(line).request }, ..asked(line) };
    for different in [
        key("other", 2, line.as_bytes(), Some(&asked(line))),
        key("plan", 3, line.as_bytes(), Some(&asked(line))),
        key("plan", 2, br#"{"tokens": [1,2]}"#, Some(&asked(line))),
        key("plan", 2, line.as_bytes(), None),
        key("plan", 2, line.as_bytes(), Some(&other)),
    ] {
        assert_ne!(base, different);
    }
}
