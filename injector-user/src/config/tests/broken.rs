//! Every file in `broken/` is rejected with the messages in the snapshot beside it.

use std::{collections::BTreeSet, fs, path::Path};

use crate::config::Config;

#[test]
fn broken_files_are_rejected_with_all_their_errors() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/tests/broken");
    let paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let stems = |extension: &str| -> BTreeSet<&str> {
        let of_kind = paths.iter().filter(|path| path.extension().is_some_and(|it| it == extension));
        of_kind.map(|path| path.file_stem().unwrap().to_str().unwrap()).collect()
    };
    let files = stems("toml");
    let stale: Vec<_> = stems("snap").into_iter().filter(|name| !files.contains(name)).collect();
    assert!(stale.is_empty(), "snapshots without a file: {stale:?}");
    for path in paths.iter().filter(|path| path.extension().is_some_and(|it| it == "toml")) {
        let name = path.file_stem().unwrap().to_str().unwrap();
        let text = fs::read_to_string(path).unwrap();
        let error = Config::parse(&text, &format!("{name}.toml")).expect_err(name).to_string();
        insta::with_settings!(
            { snapshot_path => "broken", prepend_module_to_snapshot => false, omit_expression => true },
            { insta::assert_snapshot!(name, error) }
        );
    }
}
