//! A database's address as SQLAlchemy writes it, turned into the one that our driver reads.

use std::fmt;

use super::sql::Dialect;

/// Where the database is and who we are there: `mysql+pymysql://…`, `postgresql+psycopg2://…` or `sqlite:///path`. It is not
/// shown by `Debug`, since it holds a password.
#[derive(Clone, PartialEq, Eq)]
pub struct DatabaseUrl {
    pub(super) dialect: Dialect,
    /// As our driver reads it.
    pub(super) url: String,
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({:?})", self.dialect)
    }
}

impl DatabaseUrl {
    /// Takes apart what stands behind `connection`; says what is wrong with it without showing it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (name, rest) =
            text.split_once("://").ok_or("write dialect+driver://user:password@host/database")?;
        let dialect = match name.split('+').next() {
            Some("mysql" | "mariadb") => Dialect::MySql,
            Some("postgresql" | "postgres") => Dialect::Postgres,
            Some("sqlite") => Dialect::Sqlite,
            _ => return Err("the database must be mysql, mariadb, postgresql or sqlite"),
        };
        // As SQLAlchemy, which takes everything up to an @ for the login if there is no / before the password's colon.
        let (login, rest) = login_and_rest(rest);
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, database) = place.split_once('/').unwrap_or((place, ""));
        let options = query.split('&').filter_map(|pair| pair.split_once('='));
        let url = if dialect == Dialect::Sqlite {
            if database.is_empty() || database == ":memory:" {
                return Err("a database in memory is no use: write sqlite:////path");
            }
            format!("sqlite://{}", encoded(&decoded(database)))
        } else {
            let login = login.map(|(user, password)| {
                let password = password.map(|password| format!(":{}", encoded(&decoded(password))));
                format!("{}{}@", encoded(&decoded(user)), password.unwrap_or_default())
            });
            let host = if host.is_empty() { "localhost" } else { host };
            let scheme = if dialect == Dialect::MySql { "mysql" } else { "postgresql" };
            let mut url =
                format!("{scheme}://{}{host}/{}", login.unwrap_or_default(), encoded(&decoded(database)));
            let mut sign = '?';
            for (name, value) in options.flat_map(|option| driver_options(dialect, option)) {
                url.push_str(&format!("{sign}{name}={value}"));
                sign = '&';
            }
            url
        };
        Ok(Self { dialect, url })
    }
}

type Login<'a> = (&'a str, Option<&'a str>);

fn login_and_rest(text: &str) -> (Option<Login<'_>>, &str) {
    let none = (None, text);
    // The user ends at the first colon, and has no slash; the password ends at the first @.
    let Some(end) = text.find([':', '/', '@']) else { return none };
    match text.as_bytes().get(end) {
        Some(b'@') => (Some((&text[..end], None)), &text[end + 1..]),
        Some(b':') => match text[end + 1..].split_once('@') {
            Some((password, rest)) => (Some((&text[..end], Some(password))), rest),
            None => none,
        },
        _ => none,
    }
}

/// What an option of pymysql or psycopg2 is called in our driver; one that only says what our driver does anyway is left out.
fn driver_options<'a>(dialect: Dialect, (name, value): (&'a str, &'a str)) -> Vec<(&'a str, &'a str)> {
    let is_true = matches!(value.to_lowercase().as_str(), "true" | "1" | "yes");
    match (dialect, name) {
        (Dialect::MySql, "unix_socket") => vec![("socket", value)],
        // Whoever names the authority wants the certificate looked at.
        (Dialect::MySql, "ssl_ca") => vec![("ssl-mode", "VERIFY_CA"), ("ssl-ca", value)],
        (Dialect::MySql, "ssl_cert") => vec![("ssl-cert", value)],
        (Dialect::MySql, "ssl_key") => vec![("ssl-key", value)],
        (Dialect::MySql, "ssl_verify_identity" | "ssl_check_hostname") if is_true => {
            vec![("ssl-mode", "VERIFY_IDENTITY")]
        }
        (Dialect::Postgres, "host" | "port" | "sslmode" | "sslrootcert" | "sslcert" | "sslkey") => {
            vec![(name, value)]
        }
        _ => Vec::new(),
    }
}

/// Undoes percent-encoding; what is no such code stays as it is.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        let code = (*first == b'%').then(|| others.get(..2)).flatten();
        // A sign is no digit, though Rust reads it as a part of a number.
        let code = code.filter(|two| two.iter().all(u8::is_ascii_hexdigit));
        let code = code.and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &others[2..] } else { others };
    }
    bytes
}

fn encoded(bytes: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    bytes
        .iter()
        .map(|&byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Result<String, &'static str> {
        DatabaseUrl::parse(text).map(|parsed| parsed.url)
    }

    #[test]
    fn addresses_of_sqlalchemy_become_those_of_the_driver() {
        for (text, expected) in [
            (
                "mysql+pymysql://cinder:se:cr/et?@db:3306/cinder?charset=utf8",
                "mysql://cinder:se%3Acr/et%3F@db:3306/cinder",
            ),
            ("mysql+pymysql://cinder:a%40b@[::1]:3306/cinder", "mysql://cinder:a%40b@[::1]:3306/cinder"),
            ("mysql://cinder@db/cinder", "mysql://cinder@db/cinder"),
            ("mysql+pymysql://c:p@/cinder?unix_socket=/run/s", "mysql://c:p@localhost/cinder?socket=/run/s"),
            (
                "mariadb+pymysql://c:p@db/cinder?ssl_ca=/ca.pem&ssl_verify_identity=true",
                "mysql://c:p@db/cinder?ssl-mode=VERIFY_CA&ssl-ca=/ca.pem&ssl-mode=VERIFY_IDENTITY",
            ),
            (
                "postgresql+psycopg2://c:p@db/cinder?sslmode=require&x=y",
                "postgresql://c:p@db/cinder?sslmode=require",
            ),
            ("sqlite:////var/lib/cinder/c.sqlite?timeout=30", "sqlite:///var/lib/cinder/c.sqlite"),
            ("sqlite:///c d.sqlite", "sqlite://c%20d.sqlite"),
        ] {
            assert_eq!(url(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["", "cinder", "oracle://c@db/cinder", "sqlite://", "sqlite:///:memory:"] {
            assert!(url(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_percent_before_a_plus_sign_is_no_code_in_a_password() {
        assert_eq!(url("mysql://c:a%+5b@db/cinder").as_deref(), Ok("mysql://c:a%25%2B5b@db/cinder"));
    }

    #[test]
    fn the_password_is_not_shown() {
        assert_eq!(
            format!("{:?}", DatabaseUrl::parse("mysql://c:hidden@db/cinder")),
            "Ok(DatabaseUrl(MySql))"
        );
    }
}
