//! Which room may use which: the arrows of ARCHITECTURE.md, read off the sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A room and what it may name after `crate::`.
const ARROWS: [(&str, &[&str]); 8] = [
    ("ir", &["ir"]),
    ("plan", &["plan"]),
    ("cuda", &["cuda"]),
    ("passes", &["passes", "ir"]),
    ("codegen", &["codegen", "passes", "ir", "plan", "cuda"]),
    ("runtime", &["runtime", "plan", "cuda"]),
    ("text", &["text"]),
    ("cli", &["cli", "text", "codegen", "passes", "ir", "plan", "runtime", "cuda"]),
];

fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).expect("a source folder can be listed") {
        let path = entry.expect("a source folder can be listed").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file can be read");
            found.push((path.display().to_string(), text));
        }
    }
}

#[test]
fn rooms_use_only_the_rooms_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = vec![];
    let mut rooms: BTreeSet<String> = BTreeSet::new();
    for entry in fs::read_dir(&root).expect("src can be listed") {
        let path = entry.expect("src can be listed").path();
        if path.is_dir() {
            rooms.insert(path.file_name().expect("a folder has a name").to_string_lossy().into_owned());
        }
    }
    assert_eq!(rooms, ARROWS.iter().map(|(room, _)| (*room).to_owned()).collect(), "a room without a rule");
    for (room, allowed) in ARROWS {
        let mut files = vec![];
        sources(&root.join(room), &mut files);
        assert!(!files.is_empty(), "the room {room} is empty");
        for (path, text) in files {
            for (number, line) in text.lines().enumerate() {
                for used in line.split("crate::").skip(1) {
                    let name: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    if rooms.contains(&name) && !allowed.contains(&name.as_str()) {
                        faults.push(format!("{path}:{}: {room} may not use {name}", number + 1));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn unsafe_code_stands_in_two_rooms_alone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (room, _) in ARROWS.iter().filter(|(room, _)| !["runtime", "cuda"].contains(room)) {
        let mut files = vec![];
        sources(&root.join(room), &mut files);
        for (path, text) in files {
            assert!(!text.contains("allow(unsafe_code)"), "{path} allows unsafe code outside of runtime and cuda");
        }
    }
}
