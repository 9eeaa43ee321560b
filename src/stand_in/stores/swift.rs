//! Swift, where each request may say whose account its backups lie in.

use serde_json::Value;
use url::Url;

use super::{Error, chunking, file, needed, url, usual_http};
use crate::cinder::conf;
use crate::config::StoreKind;
use crate::job::Container;
use crate::message::oslo::Context;
use crate::store::{Credentials, Endpoint, HttpSettings, Secret, SecretFrom, SwiftSettings};

/// The store for a request. What the request must say is looked at last.
pub(super) fn store(default: &conf::Default, context: &Context) -> Result<StoreKind, Error> {
    let chunking = chunking(
        default,
        ("backup_swift_object_size", default.backup_swift_object_size),
        ("backup_swift_block_size", default.backup_swift_block_size),
    )?;
    let (option, container) = ("backup_swift_container", &default.backup_swift_container);
    if let Err(source) = container.parse::<Container>() {
        return Err(Error::Name { option, source });
    }
    if container.contains('/') {
        let problem = "write the name of a container, without '/'";
        return Err(Error::Value { option, value: container.clone(), problem });
    }
    let (auth_url, credentials, endpoint) = match default.backup_swift_auth.as_str() {
        "single_user" => single_user(default, context)?,
        _ => {
            let account = account(default, context)?;
            let token = context.text("auth_token").ok_or_else(|| {
                let problem = "has no token of its user, who must send it again; or write backup_swift_auth = single_user";
                Error::Request { problem: problem.into() }
            })?;
            let token = Credentials::Token(Secret::new(token.into()));
            (account.clone(), token, Endpoint::At(account))
        }
    };
    let settings = SwiftSettings {
        auth_url,
        credentials,
        endpoint,
        container: container.clone(),
        create_containers: default.backup_create_containers,
        storage_policy: default
            .backup_swift_create_storage_policy
            .clone()
            .filter(|policy| !policy.is_empty()),
        http: HttpSettings {
            ca_file: file(&default.backup_swift_ca_cert_file),
            any_certificate: default.backup_swift_auth_insecure,
            ..usual_http(default.backup_swift_retry_attempts)
        },
    };
    Ok(StoreKind::Swift { settings: Box::new(settings), chunking })
}

/// How the one user of all backups logs in. As Cinder's driver has it, what is said of other endpoints than the login's is of
/// no use there.
fn single_user(default: &conf::Default, context: &Context) -> Result<(Url, Credentials, Endpoint), Error> {
    const NEEDS: &str = "backup_swift_auth = single_user needs it";
    let user = needed("backup_swift_user", default.backup_swift_user.as_deref(), NEEDS)?;
    let key = default.backup_swift_key.as_ref().map(conf::Secret::reveal);
    let key = SecretFrom::Setting(Secret::new(needed("backup_swift_key", key, NEEDS)?.into()));
    let (credentials, endpoint) = match default.backup_swift_auth_version.as_str() {
        "1" | "1.0" => (Credentials::V1 { user: user.into(), key }, Endpoint::Told),
        "3" | "3.0" => {
            let text = |option: &Option<String>| option.clone().filter(|text| !text.is_empty());
            let tenant = text(&default.backup_swift_tenant);
            // Cinder's client takes both together.
            let (of_user, user) = match user.split_once(':') {
                Some((project, user)) if tenant.is_none() => (Some(project.to_owned()), user),
                _ => (None, user),
            };
            let project = text(&default.backup_swift_project).or(tenant).or(of_user);
            let needs = "backup_swift_auth_version = 3 needs it";
            let domain = |option| text(option).unwrap_or_else(|| "Default".into());
            let credentials = Credentials::Password {
                user: user.into(),
                user_domain: domain(&default.backup_swift_user_domain),
                project: needed("backup_swift_project", project.as_deref(), needs)?.into(),
                project_domain: domain(&default.backup_swift_project_domain),
                password: key,
            };
            let endpoint = Endpoint::Catalog {
                service_type: "object-store".into(),
                interface: "public".into(),
                region: None,
            };
            (credentials, endpoint)
        }
        other => {
            let problem = "write 1, or 3 for Keystone, whose version 2 is gone since 2018";
            return Err(Error::Value { option: "backup_swift_auth_version", value: other.into(), problem });
        }
    };
    let option = "backup_swift_auth_url";
    let auth_url = match &default.backup_swift_auth_url {
        Some(text) => url(option, text)?,
        None => endpoint_in_catalog(
            default,
            context,
            "keystone_catalog_info",
            &default.keystone_catalog_info,
            option,
        )?,
    };
    Ok((auth_url, credentials, endpoint))
}

/// Where the account is of the project that asks.
fn account(default: &conf::Default, context: &Context) -> Result<Url, Error> {
    let option = "backup_swift_url";
    let Some(base) = &default.backup_swift_url else {
        let info = &default.swift_catalog_info;
        return endpoint_in_catalog(default, context, "swift_catalog_info", info, option);
    };
    url(option, base)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    let project_id = context.project_id().filter(|id| !id.is_empty() && id.chars().all(plain));
    let project_id =
        project_id.ok_or_else(|| Error::Request { problem: "has no id of its project".into() })?;
    url(option, &format!("{base}{project_id}"))
}

/// The endpoint in the catalog of a request that an option wants, found as Cinder's driver does. `instead` is the option that
/// needs no catalog.
fn endpoint_in_catalog(
    default: &conf::Default,
    context: &Context,
    option: &'static str,
    info: &str,
    instead: &'static str,
) -> Result<Url, Error> {
    let parts: Vec<&str> = info.split(':').collect();
    let [service_type, _, interface] = parts[..] else {
        let problem = "write TYPE:NAME:ENDPOINT, such as object-store:swift:publicURL";
        return Err(Error::Value { option, value: info.into(), problem });
    };
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let services = list(context.get("service_catalog"));
    let service = services.iter().find(|service| service["type"] == service_type);
    let endpoints = list(service.and_then(|service| service.get("endpoints")));
    let region = default.backup_swift_region_name.as_deref().filter(|region| !region.is_empty());
    let in_region = region.and_then(|region| endpoints.iter().find(|endpoint| endpoint["region"] == region));
    let endpoint = in_region.or(endpoints.first()).and_then(|endpoint| endpoint.get(interface)?.as_str());
    let endpoint = endpoint.ok_or_else(|| {
        let problem =
            format!("has no {interface} of {service_type} ({option}) in its catalog: write {instead}");
        Error::Request { problem }
    })?;
    url(option, endpoint)
}
