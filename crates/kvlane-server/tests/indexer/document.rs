//! The OpenAPI document says what the service does.

use super::Running;
use super::client::{call, get};
use kvlane_server::indexer::{DOCUMENT, ROUTES};
use serde_json::Value;
use std::collections::BTreeSet;

#[tokio::test]
async fn the_document_is_served_and_lists_exactly_the_calls_that_exist() {
    let indexer = Running::with(|config| config.api.allow_pausing = true).await;
    let served = get(indexer.at, "/openapi.json").await;
    assert_eq!(served.text, DOCUMENT);
    let document = served.json();
    let mut listed = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            listed.insert((method.clone(), path.clone()));
        }
    }
    let routes: BTreeSet<(String, String)> =
        ROUTES.iter().map(|(m, p)| ((*m).to_owned(), (*p).to_owned())).collect();
    assert_eq!(listed, routes);
    for (method, path) in &routes {
        let path = path.replace("{id}", "1");
        for tried in ["get", "post", "delete", "put"] {
            let status = call(indexer.at, &tried.to_uppercase(), &path, b"{").await.status;
            let known = routes.iter().any(|(m, p)| m == tried && p.replace("{id}", "1") == path);
            assert_eq!(status != 405, known, "{tried} {path}: {status} ({method})");
        }
    }
    indexer.stop().await;
}

#[test]
fn every_reference_in_the_document_leads_somewhere() {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    fn walk(node: &Value, document: &Value) {
        match node {
            Value::Object(fields) => {
                if let Some(target) = fields.get("$ref") {
                    let pointer = target.as_str().unwrap().trim_start_matches('#');
                    assert!(document.pointer(pointer).is_some(), "{target}");
                }
                fields.values().for_each(|value| walk(value, document));
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, document)),
            _ => {}
        }
    }
    walk(&document, &document);
}
