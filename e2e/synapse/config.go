package synapse

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"

	"gopkg.in/yaml.v3"
)

type settings = map[string]any

// unlimited is a rate limit that no test reaches.
var unlimited = settings{"per_second": 100_000, "burst_count": 100_000}

// baseSettings are those of a homeserver for tests: anyone may register, nobody is slowed down, it talks to no other server, and
// it saves work that no test looks at.
func baseSettings(dir string) settings {
	return settings{
		"server_name":         ServerName,
		"pid_file":            filepath.Join(dir, "homeserver.pid"),
		"signing_key_path":    filepath.Join(dir, "signing.key"),
		"media_store_path":    filepath.Join(dir, "media"),
		"log_config":          filepath.Join(dir, "log.yaml"),
		"macaroon_secret_key": rand.Text(),
		"form_secret":         rand.Text(),
		"report_stats":        false,
		"database": settings{
			"name": "sqlite3",
			"args": settings{"database": filepath.Join(dir, "homeserver.db")},
		},

		"enable_registration":                      true,
		"enable_registration_without_verification": true,
		"bcrypt_rounds":                            4,

		"trusted_key_servers":         []any{},
		"federation_domain_whitelist": []any{},
		"presence":                    settings{"enabled": false},
		"user_directory":              settings{"enabled": false},
		"stats":                       settings{"enabled": false},

		"rc_message":                     unlimited,
		"rc_registration":                unlimited,
		"rc_registration_token_validity": unlimited,
		"rc_login":                       settings{"address": unlimited, "account": unlimited, "failed_attempts": unlimited},
		"rc_admin_redaction":             unlimited,
		"rc_joins":                       settings{"local": unlimited, "remote": unlimited},
		"rc_joins_per_room":              unlimited,
		"rc_invites":                     settings{"per_room": unlimited, "per_user": unlimited, "per_issuer": unlimited},
		"rc_third_party_invite":          unlimited,
		"rc_3pid_validation":             unlimited,
		"rc_key_requests":                unlimited,
		"rc_media_create":                unlimited,
		"rc_presence":                    settings{"per_user": unlimited},
		"rc_delayed_event_mgmt":          unlimited,
		"rc_room_creation":               unlimited,
		"rc_reports":                     unlimited,
		"rc_user_directory":              unlimited,
		"rc_profile":                     unlimited,
	}
}

// logSettings make Synapse write warnings and errors to standard error.
var logSettings = settings{
	"version":    1,
	"formatters": settings{"line": settings{"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
	"handlers":   settings{"stderr": settings{"class": "logging.StreamHandler", "formatter": "line"}},
	"root":       settings{"level": "WARNING", "handlers": []string{"stderr"}},
}

// writeConfig writes what stays the same whatever port the server gets. It gives the ID of the server's signing key, by which
// the server can be told from any other.
func writeConfig(dir, extraYAML string) (keyID string, err error) {
	var extra settings
	if err = yaml.Unmarshal([]byte(extraYAML), &extra); err != nil {
		return "", fmt.Errorf("the extra configuration is not YAML: %w", err)
	}
	seed := make([]byte, ed25519.SeedSize)
	if _, err = rand.Read(seed); err != nil {
		return "", fmt.Errorf("failed to make a signing key: %w", err)
	}
	version := "a_" + rand.Text()[:8]
	signingKey := fmt.Sprintf("ed25519 %s %s\n", version, base64.RawStdEncoding.EncodeToString(seed))
	if err = os.WriteFile(filepath.Join(dir, "signing.key"), []byte(signingKey), 0o600); err != nil {
		return "", fmt.Errorf("failed to write the signing key: %w", err)
	}
	if err = os.MkdirAll(filepath.Join(dir, "media"), 0o700); err != nil {
		return "", fmt.Errorf("failed to make the media store: %w", err)
	}
	for name, content := range map[string]settings{"homeserver.yaml": baseSettings(dir), "log.yaml": logSettings, "extra.yaml": extra} {
		if err = writeYAML(filepath.Join(dir, name), content); err != nil {
			return "", err
		}
	}
	return "ed25519:" + version, nil
}

// writeListener writes the part of the configuration that names the port.
func writeListener(dir string, port int) error {
	return writeYAML(filepath.Join(dir, "listener.yaml"), settings{
		"public_baseurl": fmt.Sprintf("http://127.0.0.1:%d/", port),
		"listeners": []settings{{
			"type": "http", "port": port, "bind_addresses": []string{"127.0.0.1"}, "tls": false,
			"resources": []settings{{"names": []string{"client", "keys"}}},
		}},
	})
}

func writeYAML(path string, content settings) error {
	written, err := yaml.Marshal(content)
	if err != nil {
		return fmt.Errorf("failed to encode the configuration: %w", err)
	}
	if err = os.WriteFile(path, written, 0o600); err != nil {
		return fmt.Errorf("failed to write the configuration: %w", err)
	}
	return nil
}
