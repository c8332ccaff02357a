//! Many people with many devices, as the answer to a key query shows them. A machine for each would take minutes.
use matrix_sdk_crypto::vodozemac::{Ed25519SecretKey, olm::Account};
use serde_json::{Map, Value, json};

/// The answers to key queries about so many people, so many in each, and whom they are about.
pub fn queries(people: usize, devices: usize, per_query: usize) -> Vec<(Vec<String>, Vec<u8>)> {
    let users: Vec<String> = (0..people).map(|i| format!("@sender{i}:bench")).collect();
    users.chunks(per_query).map(|chunk| (chunk.to_vec(), answer(chunk, devices))).collect()
}

fn answer(users: &[String], devices: usize) -> Vec<u8> {
    let (mut all_devices, mut masters, mut self_signing) = (Map::new(), Map::new(), Map::new());
    for user in users {
        let (master, signer) = (Ed25519SecretKey::new(), Ed25519SecretKey::new());
        let mut signer_object = cross_signing_key(user, "self_signing", &signer);
        sign(&mut signer_object, user, &master.public_key().to_base64(), |text| master.sign(text).to_base64());
        masters.insert(user.clone(), cross_signing_key(user, "master", &master));
        self_signing.insert(user.clone(), signer_object);
        let of_user = (0..devices).map(|i| {
            let id = format!("DEVICE{i:04}");
            (id.clone(), device(user, &id, &signer))
        });
        all_devices.insert(user.clone(), Value::Object(of_user.collect()));
    }
    json!({"device_keys": all_devices, "master_keys": masters, "self_signing_keys": self_signing, "failures": {}})
        .to_string()
        .into_bytes()
}

fn cross_signing_key(user: &str, usage: &str, key: &Ed25519SecretKey) -> Value {
    let public = key.public_key().to_base64();
    json!({"user_id": user, "usage": [usage], "keys": {format!("ed25519:{public}"): public}})
}

fn device(user: &str, id: &str, signer: &Ed25519SecretKey) -> Value {
    let account = Account::new();
    let mut keys = json!({
        "user_id": user, "device_id": id, "algorithms": ["m.olm.v1.curve25519-aes-sha2", "m.megolm.v1.aes-sha2"],
        "keys": {
            format!("curve25519:{id}"): account.curve25519_key().to_base64(),
            format!("ed25519:{id}"): account.ed25519_key().to_base64(),
        },
    });
    let text = keys.to_string();
    add_signature(&mut keys, user, id, account.sign(&text).to_base64());
    add_signature(&mut keys, user, &signer.public_key().to_base64(), signer.sign(text.as_bytes()).to_base64());
    keys
}

/// Signs an object that has no signatures yet. serde_json sorts the keys and leaves out spaces: that is canonical JSON.
fn sign(object: &mut Value, user: &str, key_name: &str, by: impl Fn(&[u8]) -> String) {
    let signature = by(object.to_string().as_bytes());
    add_signature(object, user, key_name, signature);
}

fn add_signature(object: &mut Value, user: &str, key_name: &str, signature: String) {
    object["signatures"][user][format!("ed25519:{key_name}")] = signature.into();
}
