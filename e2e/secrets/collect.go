package secrets

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver of PostgreSQL
	_ "github.com/mattn/go-sqlite3"    // the driver of the bot's file
	"go.mau.fi/util/dbutil"
	"gopkg.in/yaml.v3"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/attachment"
	"maunium.net/go/mautrix/crypto/goolm/account"
	goolm "maunium.net/go/mautrix/crypto/goolm/session"
	"maunium.net/go/mautrix/id"
)

const (
	accountsQuery   = `SELECT account_id, device_id FROM crypto_account`
	senderKeysQuery = `SELECT DISTINCT sender_key FROM crypto_olm_session WHERE account_id=$1`
	outboundQuery   = `SELECT room_id FROM crypto_megolm_outbound_session WHERE account_id=$1`
	secretsQuery    = `SELECT name FROM crypto_secrets WHERE account_id=$1`
	bundlesQuery    = `SELECT content FROM sendertrust_key_bundle`
)

// settings are those of the configuration that are secret, or lead to secrets.
type settings struct {
	Account struct {
		UserID      string `yaml:"user_id"`
		Password    string `yaml:"password"`
		AccessToken string `yaml:"access_token"`
		RecoveryKey string `yaml:"recovery_key"`
	} `yaml:"account"`
	Database struct {
		Type string `yaml:"type"`
		URI  string `yaml:"uri"`
	} `yaml:"database"`
	Encryption struct {
		PickleKey string `yaml:"pickle_key"`
	} `yaml:"encryption"`
}

// toBeMade is what a setting says that the bot has not made yet.
const toBeMade = "generate"

// Collect gives the secrets of bots, by their configuration files, which have to be complete: of bots that have started. A database file
// with a relative path is one in or below the configuration's folder. The bots may be running.
func Collect(ctx context.Context, configFiles ...string) (*Set, error) {
	set := NewSet()
	for _, file := range configFiles {
		if err := set.Collect(ctx, file); err != nil {
			return nil, err
		}
	}
	return set, nil
}

// Collect adds the secrets of one bot as they are now. What is known already is not added again.
func (s *Set) Collect(ctx context.Context, configFile string) error {
	written, err := os.ReadFile(configFile)
	if err != nil {
		return fmt.Errorf("failed to read the configuration: %w", err)
	}
	var config settings
	if err = yaml.Unmarshal(written, &config); err != nil {
		return fmt.Errorf("failed to read the configuration %s", configFile) // without its text
	}
	if err = s.addConfig(config); err != nil {
		return err
	}
	db, err := openDatabase(config, filepath.Dir(configFile))
	if err != nil {
		return fmt.Errorf("failed to open the database of %s: %w", config.Account.UserID, err)
	}
	defer db.Close()
	if err = s.CollectDatabase(ctx, db, config.Encryption.PickleKey); err != nil {
		return fmt.Errorf("failed to collect the secrets in the database of %s: %w", config.Account.UserID, err)
	}
	return nil
}

func (s *Set) addConfig(config settings) error {
	database := ""
	if parsed, err := url.Parse(config.Database.URI); err == nil && parsed.User != nil {
		database, _ = parsed.User.Password()
	}
	for _, configured := range []struct {
		kind  Kind
		value string
	}{
		{Password, config.Account.Password}, {AccessToken, config.Account.AccessToken}, {RecoveryKey, config.Account.RecoveryKey},
		{PickleKey, config.Encryption.PickleKey}, {DatabasePassword, database},
	} {
		if configured.value == toBeMade {
			continue
		}
		if err := s.AddText(configured.kind, config.Account.UserID, configured.value); err != nil {
			return err
		}
	}
	return nil
}

// openDatabase opens a bot's database to read it.
func openDatabase(config settings, folder string) (*dbutil.Database, error) {
	if config.Database.Type == "postgres" {
		db, err := sql.Open("pgx", config.Database.URI)
		if err != nil {
			return nil, errors.New("its URI cannot be understood") // without pgx's words: they may hold the password
		}
		return dbutil.NewWithDB(db, "postgres")
	}
	file, _, _ := strings.Cut(strings.TrimPrefix(config.Database.URI, "file:"), "?")
	if !filepath.IsAbs(file) {
		file = filepath.Join(folder, file)
	}
	db, err := sql.Open("sqlite3", (&url.URL{Scheme: "file", Opaque: file, RawQuery: "mode=ro&_busy_timeout=10000"}).String())
	if err != nil {
		return nil, err
	}
	return dbutil.NewWithDB(db, "sqlite3")
}

// CollectDatabase adds what mautrix's crypto store in a database holds, of all its accounts.
func (s *Set) CollectDatabase(ctx context.Context, db *dbutil.Database, pickleKey string) error {
	type owner struct{ userID, deviceID string }
	rows, err := db.Query(ctx, accountsQuery)
	owners, err := dbutil.NewRowIterWithError(rows, func(row dbutil.Scannable) (is owner, err error) {
		return is, row.Scan(&is.userID, &is.deviceID)
	}, err).AsList()
	if err != nil {
		return err
	}
	if len(owners) == 0 {
		return errors.New("it holds no Olm account")
	}
	for _, owner := range owners {
		store := crypto.NewSQLCryptoStore(db, dbutil.NoopLogger, owner.userID, id.DeviceID(owner.deviceID), []byte(pickleKey))
		for _, collect := range []func(context.Context, *crypto.SQLCryptoStore) error{
			s.collectAccount, s.collectOlm, s.collectInbound, s.collectOutbound, s.collectSecrets,
		} {
			if err = collect(ctx, store); err != nil {
				return err
			}
		}
	}
	return s.collectBundles(ctx, db)
}

func (s *Set) collectAccount(ctx context.Context, store *crypto.SQLCryptoStore) error {
	stored, err := store.GetAccount(ctx)
	if err != nil {
		return fmt.Errorf("failed to read the Olm account: %w", err)
	}
	olm, ok := stored.Internal.(*account.Account)
	if !ok {
		return fmt.Errorf("the Olm account is a %T", stored.Internal)
	}
	s.addOnce(DeviceKey, store.AccountID, olm.IdKeys.Ed25519.PrivateKey[:blockBytes]) // the seed; the rest is the public key
	s.addOnce(DeviceKey, store.AccountID, olm.IdKeys.Curve25519.PrivateKey)
	for _, key := range append(olm.OTKeys, olm.CurrentFallbackKey, olm.PrevFallbackKey) {
		s.addOnce(OneTimeKey, store.AccountID, key.Key.PrivateKey)
	}
	return nil
}

func (s *Set) collectOlm(ctx context.Context, store *crypto.SQLCryptoStore) error {
	senders, err := strs(ctx, store, senderKeysQuery)
	if err != nil {
		return fmt.Errorf("failed to read the Olm sessions: %w", err)
	}
	for _, sender := range senders {
		sessions, err := store.GetSessions(ctx, id.SenderKey(sender))
		if err != nil {
			return fmt.Errorf("failed to read the Olm sessions with %s: %w", sender, err)
		}
		for _, session := range sessions {
			olm, ok := session.Internal.(*goolm.OlmSession)
			if !ok {
				return fmt.Errorf("an Olm session is a %T", session.Internal)
			}
			what := store.AccountID + " with " + sender
			ratchet := &olm.Ratchet
			s.addOnce(OlmSession, what, ratchet.RootKey)
			s.addOnce(OlmSession, what, ratchet.SenderChains.RKey.PrivateKey)
			s.addOnce(OlmSession, what, ratchet.SenderChains.CKey.Key)
			for _, chain := range ratchet.ReceiverChains {
				s.addOnce(OlmSession, what, chain.CKey.Key)
			}
			for _, skipped := range ratchet.SkippedMessageKeys {
				s.addOnce(OlmSession, what, skipped.MKey.Key)
			}
		}
	}
	return nil
}

func (s *Set) collectInbound(ctx context.Context, store *crypto.SQLCryptoStore) error {
	return store.GetAllGroupSessions(ctx).Iter(func(session *crypto.InboundGroupSession) (bool, error) {
		megolm, ok := session.Internal.(*goolm.MegolmInboundSession)
		if !ok {
			return false, fmt.Errorf("an inbound Megolm session is a %T", session.Internal)
		}
		what := fmt.Sprintf("session %s in %s", session.ID(), session.RoomID)
		s.addOnce(MegolmSession, what, megolm.InitialRatchet.Data[:])
		s.addOnce(MegolmSession, what, megolm.Ratchet.Data[:])
		return true, nil
	})
}

func (s *Set) collectOutbound(ctx context.Context, store *crypto.SQLCryptoStore) error {
	rooms, err := strs(ctx, store, outboundQuery)
	if err != nil {
		return fmt.Errorf("failed to read the outbound Megolm sessions: %w", err)
	}
	for _, room := range rooms {
		session, err := store.GetOutboundGroupSession(ctx, id.RoomID(room))
		if err != nil {
			return fmt.Errorf("failed to read the outbound Megolm session of %s: %w", room, err)
		} else if session == nil {
			continue // gone since
		}
		megolm, ok := session.Internal.(*goolm.MegolmOutboundSession)
		if !ok {
			return fmt.Errorf("an outbound Megolm session is a %T", session.Internal)
		}
		what := fmt.Sprintf("%s's own session in %s", store.AccountID, room)
		s.addOnce(MegolmSession, what, megolm.Ratchet.Data[:])
		s.addOnce(MegolmSession, what, megolm.SigningKey.PrivateKey[:blockBytes])
	}
	return nil
}

// collectSecrets adds the seeds of the cross-signing keys, the key of the key backup, and what else is stored like them.
func (s *Set) collectSecrets(ctx context.Context, store *crypto.SQLCryptoStore) error {
	names, err := strs(ctx, store, secretsQuery)
	if err != nil {
		return fmt.Errorf("failed to read the names of the stored secrets: %w", err)
	}
	for _, name := range names {
		if name == "dev.sendertrust.renew_backup" {
			continue // a public key
		}
		secret, err := store.GetSecret(ctx, id.Secret(name))
		if err != nil {
			return fmt.Errorf("failed to read %s: %w", name, err)
		}
		what := store.AccountID + ": " + name
		if raw, err := decode(secret); err == nil && len(raw) >= numberBytes {
			s.addOnce(StoredSecret, what, raw)
		} else if err = s.AddText(StoredSecret, what, secret); err != nil {
			return err
		}
	}
	return nil
}

// collectBundles adds the keys of the files with rooms' history (MSC4268) that are yet to be fetched.
func (s *Set) collectBundles(ctx context.Context, db *dbutil.Database) error {
	if exists, err := db.TableExists(ctx, "sendertrust_key_bundle"); err != nil || !exists {
		return err
	}
	rows, err := db.Query(ctx, bundlesQuery)
	return dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).Iter(func(content string) (bool, error) {
		var bundle struct {
			File attachment.EncryptedFile `json:"file"`
		}
		if json.Unmarshal([]byte(content), &bundle) == nil && bundle.File.Key.Key != "" {
			return true, s.AddBase64(FileKey, "a room key bundle", bundle.File.Key.Key)
		}
		return true, nil
	})
}

// addOnce adds a key of mautrix's, unless it is not there (a session that has not sent yet has no sender chain) or known already.
func (s *Set) addOnce(kind Kind, what string, key []byte) {
	if len(bytes.Trim(key, "\x00")) < numberBytes || s.knowsKey(key) {
		return
	}
	name := s.name(kind, what)
	s.addPieces(name, key)
	if kind != MegolmSession && kind != OlmSession {
		s.addRaw(name, key)
	}
}

func strs(ctx context.Context, store *crypto.SQLCryptoStore, query string) ([]string, error) {
	rows, err := store.DB.Query(ctx, query, store.AccountID)
	return dbutil.NewRowIterWithError(rows, dbutil.ScanSingleColumn[string], err).AsList()
}
