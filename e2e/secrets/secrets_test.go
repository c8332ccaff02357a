package secrets

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.mau.fi/util/dbutil"
	_ "go.mau.fi/util/dbutil/litestream" // the driver that the bot uses
	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/attachment"
	"maunium.net/go/mautrix/crypto/goolm/account"
	goolm "maunium.net/go/mautrix/crypto/goolm/session"
	"maunium.net/go/mautrix/crypto/utils"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"

	"sendertrust/e2e/postgres"
)

const (
	botID = id.UserID("@bot:localhost")
	roomA = id.RoomID("!a:localhost")
)

// stock is a bot's files, made with mautrix's own store, and what is secret in them, as somebody could write it by mistake.
type stock struct {
	config string
	// written are the secrets by what they are.
	written map[string]planted
}

type planted struct {
	kind Kind
	text string
}

func newStock(t *testing.T) *stock {
	t.Helper()
	ctx, dir := t.Context(), t.TempDir()
	recoveryKey := utils.EncodeBase58RecoveryKey(random(32))
	var config settings
	config.Account.UserID = botID.String()
	config.Account.Password = `pass"wörd <& %`
	config.Account.AccessToken = "mda_not_of_synapse_12345"
	config.Account.RecoveryKey = recoveryKey
	config.Encryption.PickleKey = "a pickle key, made up for this"
	config.Database.Type = "sqlite3-fk-wal"
	config.Database.URI = "file:bot.db?_txlock=immediate"
	s := &stock{config: filepath.Join(dir, "config.yaml"), written: map[string]planted{
		"password":                    {Password, config.Account.Password},
		"password in JSON":            {Password, string(must(json.Marshal(config.Account.Password))(t))},
		"password in Go":              {Password, fmt.Sprintf("%q", config.Account.Password)},
		"password in a URL":           {Password, "password=pass%22w%C3%B6rd+%3C%26+%25"},
		"access token":                {AccessToken, "unknown token " + config.Account.AccessToken},
		"recovery key":                {RecoveryKey, recoveryKey},
		"recovery key without spaces": {RecoveryKey, strings.ReplaceAll(recoveryKey, " ", "")},
		"pickle key":                  {PickleKey, "wrong key: " + config.Encryption.PickleKey + "!"},
		"pickle key in base64":        {PickleKey, base64.StdEncoding.EncodeToString([]byte("x" + config.Encryption.PickleKey))},
		"pickle key as bytes":         {PickleKey, fmt.Sprint([]byte(config.Encryption.PickleKey))},
	}}
	ok(t, os.WriteFile(s.config, must(yaml.Marshal(config))(t), 0o600))
	db := must(dbutil.NewFromConfig("test", dbutil.Config{PoolConfig: dbutil.PoolConfig{
		Type: "sqlite3-fk-wal", URI: "file:" + filepath.Join(dir, "bot.db") + "?_txlock=immediate", MaxOpenConns: 1,
	}}, dbutil.NoopLogger))(t)
	t.Cleanup(func() { _ = db.Close() })
	store := crypto.NewSQLCryptoStore(db, dbutil.NoopLogger, botID.String(), "BOT", []byte(config.Encryption.PickleKey))
	ok(t, store.DB.Upgrade(ctx))
	s.fill(t, ctx, store)
	return s
}

// fill gives a bot one of everything.
func (s *stock) fill(t *testing.T, ctx context.Context, store *crypto.SQLCryptoStore) {
	t.Helper()
	own := crypto.NewOlmAccount()
	ok(t, own.Internal.GenOneTimeKeys(3))
	ok(t, own.Internal.(*account.Account).GenFallbackKey())
	ok(t, store.PutAccount(ctx, own))
	keys := own.Internal.(*account.Account)
	s.plantKey("signing key", DeviceKey, keys.IdKeys.Ed25519.PrivateKey)
	s.plantKey("identity key", DeviceKey, keys.IdKeys.Curve25519.PrivateKey)
	s.plantKey("one-time key", OneTimeKey, keys.OTKeys[2].Key.PrivateKey)
	s.plantKey("fallback key", OneTimeKey, keys.CurrentFallbackKey.Key.PrivateKey)
	s.written["signing key by zerolog"] = planted{DeviceKey, logged("key", keys.IdKeys.Ed25519.PrivateKey[:32])}
	s.written["identity key in Go"] = planted{DeviceKey, fmt.Sprintf("%q", []byte(keys.IdKeys.Curve25519.PrivateKey))}

	// An Olm session that was answered, and used again, so that it has a chain of each kind.
	alice := crypto.NewOlmAccount()
	ok(t, alice.Internal.GenOneTimeKeys(1))
	_, aliceKey := alice.Keys()
	var aliceOneTime id.Curve25519
	for _, key := range must(alice.Internal.OneTimeKeys())(t) {
		aliceOneTime = key
	}
	outgoing := must(own.Internal.NewOutboundSession(aliceKey, aliceOneTime))(t)
	_, first := try2(outgoing.Encrypt([]byte("hello")))(t)
	incoming := must(alice.Internal.NewInboundSession(string(first)))(t)
	must(incoming.Decrypt(string(first), id.OlmMsgTypePreKey))(t)
	kind, answer := try2(incoming.Encrypt([]byte("hello yourself")))(t)
	must(outgoing.Decrypt(string(answer), kind))(t)
	try2(outgoing.Encrypt([]byte("how are you")))(t)
	now := time.Now()
	ok(t, store.AddSession(ctx, aliceKey, &crypto.OlmSession{
		Internal: outgoing, ExpirationMixin: crypto.ExpirationMixin{TimeMixin: crypto.TimeMixin{CreationTime: now, LastEncryptedTime: now, LastDecryptedTime: now}},
	}))
	ratchet := &outgoing.(*goolm.OlmSession).Ratchet
	s.plantKey("Olm root key", OlmSession, ratchet.RootKey)
	s.plantKey("Olm sender's chain", OlmSession, ratchet.SenderChains.CKey.Key)
	s.plantKey("Olm sender's ratchet key", OlmSession, ratchet.SenderChains.RKey.PrivateKey)
	s.plantKey("Olm receiver's chain", OlmSession, ratchet.ReceiverChains[0].CKey.Key)

	theirs := must(goolm.NewMegolmOutboundSession())(t)
	sessionKey := theirs.Key()
	inbound := must(crypto.NewInboundGroupSession(aliceKey, "signing key", roomA, sessionKey, 0, 0, nil, false))(t)
	for range 2 {
		try2(inbound.Internal.Decrypt(must(theirs.Encrypt([]byte("a message")))(t)))(t)
	}
	ok(t, store.PutGroupSession(ctx, inbound))
	s.written["Megolm session key"] = planted{MegolmSession, `"session_key":"` + sessionKey + `"`}
	s.written["Megolm session key for URLs"] = planted{MegolmSession, urlSafe(sessionKey) + "=="}
	s.written["Megolm exported session"] = planted{MegolmSession, string(must(inbound.Internal.Export(0))(t))}
	s.written["Megolm exported later"] = planted{MegolmSession, string(must(inbound.Internal.Export(1))(t))}
	s.plantKey("Megolm ratchet's last part", MegolmSession, inbound.Internal.(*goolm.MegolmInboundSession).Ratchet.Data[96:])

	ours := must(crypto.NewOutboundGroupSession(roomA, &event.EncryptionEventContent{Algorithm: id.AlgorithmMegolmV1}, nil))(t)
	ours.Shared = true
	ok(t, store.AddOutboundGroupSession(ctx, ours))
	s.written["own Megolm session"] = planted{MegolmSession, ours.Internal.Key()}
	s.plantKey("own Megolm session's signing key", MegolmSession, ours.Internal.(*goolm.MegolmOutboundSession).SigningKey.PrivateKey[:32])

	for _, name := range []id.Secret{id.SecretXSMaster, id.SecretXSSelfSigning, id.SecretXSUserSigning, id.SecretMegolmBackupV1} {
		seed := random(32)
		ok(t, store.PutSecret(ctx, name, base64.StdEncoding.EncodeToString(seed)))
		s.plantKey(name.String(), StoredSecret, seed)
	}

	file := attachment.NewEncryptedFile()
	must(store.DB.Exec(ctx, `CREATE TABLE sendertrust_key_bundle (content TEXT NOT NULL)`))(t)
	must(store.DB.Exec(ctx, `INSERT INTO sendertrust_key_bundle VALUES ($1)`,
		string(must(json.Marshal(map[string]any{"room_id": roomA, "file": file}))(t))))(t)
	s.written["key of a file"] = planted{FileKey, fmt.Sprintf("%+v", file)}
}

// plantKey has a raw key written in each way, and in base64 in each place of a longer run.
func (s *stock) plantKey(name string, kind Kind, key []byte) {
	for before := range 3 {
		longer := append(bytes.Repeat([]byte{'x'}, before), append(key[:len(key):len(key)], "more"...)...)
		s.written[fmt.Sprintf("%s in base64 after %d bytes", name, before)] = planted{kind, base64.StdEncoding.EncodeToString(longer)}
	}
	s.written[name+" in base64 for URLs"] = planted{kind, base64.RawURLEncoding.EncodeToString(key)}
	s.written[name+" in hexadecimal digits"] = planted{kind, hex.EncodeToString(key)}
	s.written[name+" in capital digits"] = planted{kind, fmt.Sprintf("%X", key)}
	s.written[name+" as Go's list"] = planted{kind, fmt.Sprint(key)}
	s.written[name+" as JSON's list"] = planted{kind, strings.ReplaceAll(fmt.Sprint(key), " ", ",")}
	s.written[name+" cut short"] = planted{kind, base64.StdEncoding.EncodeToString(key)[:22] + "…"}
}

func TestEverySecretIsFound(t *testing.T) {
	t.Parallel()
	stock := newStock(t)
	set := must(Collect(t.Context(), stock.config))(t)
	for name, secret := range stock.written {
		t.Run(name, func(t *testing.T) {
			line := logged("value", []byte("see: ")) + "\n" + `{"level":"trace","error":"it failed: ` + secret.text + `, at last"}` + "\nthe last line"
			hits := set.ScanText("a.log", line)
			if len(hits) == 0 {
				t.Fatal("not found")
			}
			for _, hit := range hits {
				if hit.File != "a.log" || hit.Line != 2 || hit.Kind != secret.kind {
					t.Errorf("found %v", hit)
				}
			}
		})
	}
	// The secrets are found by what was collected, and not by their looks only.
	for _, kind := range []Kind{
		Password, RecoveryKey, PickleKey, AccessToken, DeviceKey, OneTimeKey, OlmSession, MegolmSession, StoredSecret, FileKey,
	} {
		if set.Count(kind) == 0 {
			t.Errorf("no %s was collected", kind)
		}
	}
}

func TestWhatIsHandedInIsFound(t *testing.T) {
	t.Parallel()
	theirs := must(goolm.NewMegolmOutboundSession())(t)
	set := NewSet()
	ok(t, set.AddText(Body, "alice", "nobody else's business, 1"))
	ok(t, set.AddText(Body, "alice", strings.Repeat("a long body, ", 100)))
	ok(t, set.AddSessionKey("alice's session", theirs.Key()))
	pluses := bytes.Repeat([]byte{0xfb, 0xef, 0xbe}, 11) // "++++" in the standard alphabet
	ok(t, set.AddBase64(StoredSecret, "alice", base64.RawURLEncoding.EncodeToString(pluses)))
	for name, test := range map[string]struct {
		line string
		want []Kind
	}{
		"body":          {`{"body":"nobody else's business, 1"}`, []Kind{Body}},
		"another":       {`{"body":"nobody else's business, 2"}`, nil},
		"long body":     {strings.Repeat("a long body, ", 30), []Kind{Body}},
		"session key":   {theirs.Key(), []Kind{MegolmSession, MegolmSession}}, // by its looks too
		"part of a key": {theirs.Key()[10:100], []Kind{MegolmSession}},
		"session ID":    {theirs.ID().String(), nil},
		"in base64":     {base64.StdEncoding.EncodeToString(pluses), []Kind{StoredSecret}},
		"two":           {"nobody else's business, 1 and nobody else's business, 1 with " + theirs.Key()[10:100], []Kind{Body, MegolmSession}},
	} {
		t.Run(name, func(t *testing.T) {
			var kinds []Kind
			for _, hit := range set.ScanText("", test.line) {
				kinds = append(kinds, hit.Kind)
			}
			if fmt.Sprint(kinds) != fmt.Sprint(test.want) {
				t.Errorf("found %v, want %v", kinds, test.want)
			}
		})
	}
}

func TestUnknownSecretsAreFoundByTheirLooks(t *testing.T) {
	t.Parallel()
	unknown := must(goolm.NewMegolmOutboundSession())(t)
	for line, want := range map[string]Kind{
		"token syt_Ym90MQ_KxPeuEqvQiLyLvPgRJxi_2AqDzY":             AccessToken,
		"Authorization: Bearer abcdefghijklmnopqrst":               AccessToken,
		"GET /_matrix/client/v3/sync?access_token=abcdef&since=":   AccessToken,
		`{"access_token":"abcdef"}`:                                AccessToken,
		`{"body":"{\"access_token\": \"abcdef\"}"}`:                AccessToken,
		`{"session_key":"` + unknown.Key() + `"}`:                  MegolmSession,
		"account.access_token: the homeserver does not know it":    "",
		"access_token=[redacted]":                                  "",
		"a bearer of good news, Bearer of the ring":                "",
		"event $aaaasyt_KxPeuEqvQiLyLvPgRJxi_KxPeuEqvQiLyLvPgRJxi": "",
		"AgAA is not long enough to be a session key":              "",
	} {
		hits := NewSet().ScanText("", line)
		if found := len(hits) == 1 && hits[0].Kind == want; len(hits) > 0 != (want != "") || want != "" && !found {
			t.Errorf("%s: found %v, want %q", line, hits, want)
		}
	}
}

// honestLog writes what a bot writes at trace level.
func honestLog(lines int) []byte {
	var out bytes.Buffer
	log := zerolog.New(&out).With().Timestamp().Logger()
	for i := range lines {
		key := base64.RawStdEncoding.EncodeToString(random(32))
		log.Debug().Str("room_id", "!"+key[:18]+":localhost").Str("session_id", key).Int("n", i).Hex("hash", random(32)).
			Str("event_id", "$"+base64.RawURLEncoding.EncodeToString(random(32))).Msg("Received a room key")
		log.Trace().Str("component", "database").Str("query", "SELECT device_id, identity_key FROM crypto_device WHERE user_id=$1").
			Float64("duration", 0.21).Ints("steps", []int{1, 2, 3}).Send()
	}
	return out.Bytes()
}

func TestHonestLogHasNoHits(t *testing.T) {
	t.Parallel()
	set := must(Collect(t.Context(), newStock(t).config))(t)
	ok(t, set.AddText(Body, "alice", "nobody else's business"))
	if hits := must(set.Scan(bytes.NewReader(honestLog(20_000)), "honest.log"))(t); len(hits) > 0 {
		t.Errorf("found %v", hits)
	}
}

// A secret is found once, wherever the borders of the chunks are, and its line is the right one.
func TestSecretsAtTheBordersOfChunksAreFound(t *testing.T) {
	t.Parallel()
	set := NewSet()
	ok(t, set.AddText(Body, "alice", "nobody else's business"))
	key := random(32)
	ok(t, set.AddKey(DeviceKey, "bot", key))
	for _, border := range []int{chunkBytes, chunkBytes + overlap, 2 * chunkBytes} {
		for before := -60; before <= 60; before += 3 {
			log := bytes.Repeat([]byte("some words\n"), border/11+10)[:border+before]
			lines := bytes.Count(log, []byte{'\n'}) + 1
			log = append(log, " nobody else's business "...)
			log = fmt.Appendf(log, "%x\n%v\n", key, key)
			log = append(log, bytes.Repeat([]byte("other words\n"), overlap/6)...)
			hits := must(set.Scan(bytes.NewReader(log), "x"))(t)
			if len(hits) != 3 || hits[0].Kind != Body || hits[0].Line != lines || hits[1].Line != lines || hits[2].Line != lines+1 {
				t.Fatalf("%d bytes from %d: found %v, want a body and a key on line %d, and a key on the next", before, border, hits, lines)
			}
		}
	}
}

func TestSecretsOnPostgreSQLAreCollected(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("needs PostgreSQL: not with -short")
	}
	server := must(postgres.Start(t.Context(), "../.."))(t)
	t.Cleanup(func() { ok(t, server.Stop()) })
	var config settings
	config.Account.UserID, config.Account.Password = botID.String(), "correct-horse"
	config.Encryption.PickleKey = "a pickle key, made up for this"
	config.Database.Type = "postgres"
	config.Database.URI = must(server.NewDatabase(t.Context()))(t)
	file := filepath.Join(t.TempDir(), "config.yaml")
	ok(t, os.WriteFile(file, must(yaml.Marshal(config))(t), 0o600))
	db := must(openDatabase(config, ""))(t)
	t.Cleanup(func() { _ = db.Close() })
	store := crypto.NewSQLCryptoStore(db, dbutil.NoopLogger, botID.String(), "BOT", []byte(config.Encryption.PickleKey))
	ok(t, store.DB.Upgrade(t.Context()))
	s := &stock{written: map[string]planted{}}
	s.fill(t, t.Context(), store)
	set := must(Collect(t.Context(), file))(t)
	for name, secret := range s.written {
		if len(set.ScanText("a.log", secret.text)) == 0 {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestFolderIsScanned(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	set := NewSet()
	ok(t, set.AddText(Password, "bot", "correct-horse"))
	ok(t, os.Mkdir(filepath.Join(dir, "kills"), 0o700))
	for name, text := range map[string]string{"a.log": "fine\n", "kills/b.log": "fine\ncorrect-horse\n", "config.yaml": "correct-horse\n"} {
		ok(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	hits := must(set.ScanFolder(dir))(t)
	if len(hits) != 1 || hits[0].File != filepath.Join(dir, "kills/b.log") || hits[0].Line != 2 {
		t.Errorf("found %v, want one in kills/b.log", hits)
	}
	for _, hit := range hits {
		if strings.Contains(hit.String(), "correct-horse") {
			t.Errorf("the report shows the secret: %v", hit)
		}
	}
	if _, err := set.ScanFile(filepath.Join(dir, "none.log")); err == nil {
		t.Error("a file that is not there was scanned")
	}
}

func TestHitsAreBounded(t *testing.T) {
	t.Parallel()
	set := NewSet()
	ok(t, set.AddText(Body, "alice", "nobody else's business"))
	if hits := set.ScanText("", strings.Repeat("nobody else's business\n", 3*MostHits)); len(hits) != MostHits {
		t.Errorf("%d hits, want %d", len(hits), MostHits)
	}
}

func TestShortSecretsAreRefused(t *testing.T) {
	t.Parallel()
	set := NewSet()
	if err := set.AddText(Password, "bot", "horse"); err == nil || strings.Contains(err.Error(), "horse") {
		t.Errorf("error %v, want one without the password", err)
	}
	if err := set.AddKey(DeviceKey, "bot", random(8)); err == nil {
		t.Error("a short key was taken")
	}
	if err := set.AddSessionKey("alice", "AgAAAAA"); err == nil {
		t.Error("a short session key was taken")
	}
}

func TestUnreadableBotsAreRefused(t *testing.T) {
	t.Parallel()
	stock := newStock(t)
	written := must(os.ReadFile(stock.config))(t)
	for name, change := range map[string][2]string{
		"wrong pickle key": {"a pickle key", "another pickle key"},
		"no database":      {"bot.db", "none.db"},
	} {
		other := filepath.Join(filepath.Dir(stock.config), strings.ReplaceAll(name, " ", "-")+".yaml")
		ok(t, os.WriteFile(other, bytes.ReplaceAll(written, []byte(change[0]), []byte(change[1])), 0o600))
		if _, err := Collect(t.Context(), other); err == nil {
			t.Errorf("%s: nothing was said", name)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	set := NewSet()
	for i := range 20_000 {
		if err := set.AddKey(MegolmSession, "", random(128)); err != nil {
			b.Fatal(err)
		}
		if err := set.AddText(Body, "", fmt.Sprintf("what somebody says, number %d", i)); err != nil {
			b.Fatal(err)
		}
	}
	log := honestLog(100_000)
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if hits, err := set.Scan(bytes.NewReader(log), ""); err != nil || len(hits) > 0 {
			b.Fatal(hits, err)
		}
	}
}

func random(length int) []byte {
	bytes := make([]byte, length)
	_, _ = rand.Read(bytes) // never fails
	return bytes
}

func urlSafe(key string) string { return strings.NewReplacer("+", "-", "/", "_").Replace(key) }

// logged is a log line with bytes in it.
func logged(field string, value []byte) string {
	var line bytes.Buffer
	logger := zerolog.New(&line)
	logger.Log().Bytes(field, value).Send()
	return strings.TrimSpace(line.String())
}

func must[T any](value T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		ok(t, err)
		return value
	}
}

func try2[A, B any](a A, b B, err error) func(*testing.T) (A, B) {
	return func(t *testing.T) (A, B) {
		t.Helper()
		ok(t, err)
		return a, b
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
