//! The gateway for S3 that all tests share: Ceph's own, with one user.

use std::collections::BTreeSet;
use std::path::PathBuf;

use backhaul::store::{HttpSettings, S3Settings, Secret, SecretFrom};
use jiff::Timestamp;
use quick_xml::de::from_str;
use rusty_s3::signing::sign;
use rusty_s3::{Bucket, Method, UrlStyle};
use serde::Deserialize;
use url::Url;
use uuid::Uuid;

/// The bucket of tests that need none of their own; every test needs names of its own in it.
pub(crate) const BUCKET: &str = "tests";

/// A key for what the gateway encrypts with a key of ours.
pub(crate) const SSE_C_KEY: &str = "0123456789abcdef0123456789abcdef";

/// The URL of the gateway that `make test` starts for all tests, with the keys of its user.
pub(crate) fn url() -> String {
    variable("BACKHAUL_TEST_S3")
}

/// The same with TLS, and the file with the authority for that.
pub(crate) fn tls_url() -> (String, PathBuf) {
    (variable("BACKHAUL_TEST_S3_TLS"), variable("BACKHAUL_TEST_S3_CA").into())
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} says nothing of a gateway for S3: run `make test`, which starts one")
    })
}

/// A name that no bucket has yet.
pub(crate) fn new_bucket() -> String {
    format!("test-{}", Uuid::new_v4())
}

/// How the server at this URL, which has the keys, is used with that bucket.
pub(crate) fn settings(url: &str, bucket: &str) -> S3Settings {
    let mut endpoint = Url::parse(url).unwrap();
    let (access_key, secret_key) = keys(&endpoint);
    endpoint.set_username("").unwrap();
    endpoint.set_password(None).unwrap();
    S3Settings {
        endpoint,
        region: "us-east-1".into(),
        path_style: true,
        bucket: bucket.into(),
        create_buckets: true,
        access_key: Secret::new(access_key),
        secret_key: SecretFrom::Setting(Secret::new(secret_key)),
        sse_c_key: None,
        http: HttpSettings::default(),
    }
}

fn keys(url: &Url) -> (String, String) {
    (url.username().into(), url.password().unwrap().into())
}

/// The keys of all uploads in the bucket that begin with `prefix` and that nobody has completed.
pub(crate) async fn uploads(bucket: &str, prefix: &str) -> BTreeSet<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Page {
        #[serde(default)]
        upload: Vec<Upload>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Upload {
        key: String,
    }

    let query = [("prefix", prefix), ("uploads", "")];
    let page = get(bucket, &query).await;
    if page.contains("NoSuchBucket") {
        return BTreeSet::new();
    }
    let page: Page = from_str(&page).unwrap();
    page.upload.into_iter().map(|upload| upload.key).collect()
}

/// Asks the gateway itself about a bucket.
async fn get(bucket: &str, query: &[(&str, &str)]) -> String {
    let url = Url::parse(&url()).unwrap();
    let (access_key, secret_key) = keys(&url);
    let bucket = Bucket::new(url, UrlStyle::Path, bucket.to_owned(), "us-east-1").unwrap();
    let headers = std::iter::empty();
    let (now, region, query) = (Timestamp::now(), "us-east-1", query.iter().copied());
    let url = bucket.base_url().clone();
    let url = sign(&now, Method::Get, url, &access_key, &secret_key, None, region, 60, query, headers);
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::get(url).await.unwrap().text().await.unwrap()
}
