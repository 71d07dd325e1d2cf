use super::*;

const SMALL: &str = include_str!("../../../tests/data/small_manifest.ron");

fn small() -> PlanFile {
    let manifest = PlanFile::parse_manifest(SMALL).expect("the fixture is a manifest");
    PlanFile {
        manifest,
        recipe: "(name: \"small\")".into(),
        texts: vec!["graph @small () {\n  return\n}\n".into()],
        cubins: vec![],
    }
}

#[test]
fn the_manifest_text_is_exact() {
    let text = small().manifest_text();
    assert!(text == SMALL, "the fixture is not what the printer gives:\n{text}");
    let line = |needle: &str| text.lines().find(|line| line.contains(needle)).expect("a line");
    for needle in
        ["Concat(axis: 0", "role: KvPages", "input: true", "name: \"head.sample\"", "(\"logits\", ", "PerIndex"]
    {
        let line = line(needle).trim();
        assert!(line.starts_with('(') && line.ends_with("),"), "not on one line: {line}");
    }
}

#[test]
fn bytes_are_deterministic_and_read_back() {
    let file = small();
    let bytes = file.to_bytes();
    assert_eq!(bytes, file.to_bytes());
    let read = PlanFile::from_bytes(&bytes).expect("a valid plan");
    assert_eq!(read, file);
    assert_eq!(read.to_bytes(), bytes);
    assert_eq!(file.hash(), blake3::hash(&bytes).to_hex().as_str());
}

#[test]
fn files_are_written_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("small.plan");
    let file = small();
    file.write(&path).expect("written");
    file.write(&path).expect("written over");
    assert_eq!(PlanFile::read(&path).expect("read"), file);
    assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1, "no temporary file is left");
    let error = file.write(&folder.path().join("no/such/folder.plan")).expect_err("no folder");
    assert!(error.to_string().contains("folder.plan"), "{error}");
    assert!(PlanFile::read(folder.path()).is_err(), "a folder is no plan");
}

#[test]
fn every_truncation_is_told_as_one() {
    let bytes = small().to_bytes();
    for length in 0..bytes.len() {
        match PlanFile::from_bytes(&bytes[..length]) {
            Err(PlanError::Truncated { expected, found }) => {
                assert!(found == length as u64 && expected > found, "{length}: {expected} {found}");
            }
            Err(PlanError::NotAPlan { .. }) if length == 0 => {}
            other => panic!("{length} of {} bytes: {other:?}", bytes.len()),
        }
    }
    let longer = [&bytes[..], b"\0"].concat();
    assert!(matches!(PlanFile::from_bytes(&longer), Err(PlanError::Trailing { .. })));
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = small().to_bytes();
    let mut sections = std::collections::BTreeSet::new();
    for at in 0..bytes.len() {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        match PlanFile::from_bytes(&flipped) {
            Err(PlanError::Damaged { section, expected, found }) => {
                assert_ne!(expected, found);
                sections.insert(section);
            }
            Err(PlanError::NotAPlan { .. }) if at < 8 => {}
            Err(PlanError::Version { expected: FORMAT_VERSION, .. }) if (8..12).contains(&at) => {}
            Err(PlanError::Table(_) | PlanError::Truncated { .. }) if (12..16).contains(&at) => {}
            other => panic!("byte {at}: {other:?}"),
        }
    }
    assert_eq!(Vec::from_iter(sections), ["graph text 0", "header", "manifest", "recipe"]);
}

/// The bytes with one header field changed and the header's hash made anew.
fn resealed(at: usize, field: &[u8]) -> Vec<u8> {
    let mut bytes = small().to_bytes();
    bytes[at..at + field.len()].copy_from_slice(field);
    let end = header_bytes(3) - HASH_BYTES;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..end + HASH_BYTES].copy_from_slice(hash.as_bytes());
    bytes
}

#[test]
fn a_sealed_but_false_table_is_refused() {
    let entry = |section: usize| PREFIX_BYTES + section * ENTRY_BYTES;
    let refused = [
        (entry(0), 2u64.to_le_bytes(), "expected kind 1 (manifest)"),
        (entry(1) + 8, 0u64.to_le_bytes(), "section 1: expected kind 2 (recipe) at byte"),
        (entry(2) + 8, u64::MAX.to_le_bytes(), "section 2"),
        (entry(2) + 16, u64::MAX.to_le_bytes(), "section 2"),
    ];
    for (at, field, expected) in refused {
        let error = PlanFile::from_bytes(&resealed(at, &field)).expect_err(expected);
        assert!(matches!(&error, PlanError::Table(text) if text.contains(expected)), "{error}");
    }
}

#[test]
fn errors_say_where_and_what() {
    let with_manifest = |text: &str| {
        let bytes = seal(&[(Kind::Manifest, text.as_bytes()), (Kind::Recipe, b""), (Kind::Text, b"graph")]);
        PlanFile::from_bytes(&bytes).expect_err("a broken manifest").to_string()
    };
    let shown = with_manifest(&SMALL.replacen("kv_tokens: 16", "kv_tokens: many", 1));
    assert!(shown.contains("manifest, line ") && shown.contains("integer"), "{shown}");
    let shown = with_manifest(&SMALL.replacen("page_tokens", "page_size", 1));
    assert!(shown.contains("page_size"), "{shown}");
    let shown = with_manifest(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)));
    assert!(shown.contains("manifest, line 1"), "{shown}");
    let shown = with_manifest(&SMALL.replacen("kv_tokens: 16", "kv_tokens: 15", 1));
    assert!(shown.contains("limits: `kv_tokens`: expected whole pages of 4, found 15"), "{shown}");
    let bytes = seal(&[(Kind::Manifest, SMALL.as_bytes()), (Kind::Recipe, b"\xff"), (Kind::Text, b"graph")]);
    let shown = PlanFile::from_bytes(&bytes).expect_err("no UTF-8").to_string();
    assert!(shown.contains("recipe is no UTF-8 at byte 0"), "{shown}");
    let shown = PlanFile::from_bytes(b"PK\x03\x04 something else").expect_err("a zip file").to_string();
    assert!(shown.contains("no plan file"), "{shown}");
}
