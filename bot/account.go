package bot

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"time"

	"go.mau.fi/util/dbutil"
	"go.mau.fi/util/jsonbytes"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/crypto/signatures"
	"maunium.net/go/mautrix/crypto/ssss"
	"maunium.net/go/mautrix/crypto/utils"
	"maunium.net/go/mautrix/id"

	"sendertrust/cryptohook"
)

// ErrSetup says that the bot cannot start until somebody changes its configuration or its account. Its text is one line that
// says what.
var ErrSetup = errors.New("cannot start")

func setupError(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrSetup, fmt.Errorf(format, args...))
}

const deviceDisplayName = "sendertrust"

// errIncomplete is an answer that a homeserver does not give when all is well: no reason for anybody to change anything.
var errIncomplete = errors.New("the homeserver's answer lacks what was asked for")

// newClient makes a client that logs no bodies: they hold messages and secrets.
func (b *Bot) newClient() (*mautrix.Client, error) {
	client, err := mautrix.NewClient(b.config.Homeserver.Address, b.config.Account.UserID, b.config.Account.AccessToken.Reveal())
	if err != nil {
		return nil, setupError("homeserver.address: %w", err)
	}
	client.Client.Transport = cryptohook.WithoutNulls(client.Client.Transport)
	client.Log = b.log
	client.SyncTraceLog = true
	client.DefaultHTTPRetries = 3
	client.DefaultHTTPBackoff = time.Second
	client.RequestHook = func(req *http.Request) {
		*req = *req.WithContext(context.WithValue(req.Context(), mautrix.LogBodyContextKey, nil))
	}
	return client, nil
}

// login makes the client that of the account's device: the one of the database if there is one.
func (b *Bot) login(ctx context.Context) error {
	client, err := b.newClient()
	if err != nil {
		return err
	}
	b.client = client
	account := &b.config.Account
	stored, err := cryptohook.StoredDevice(ctx, b.db, account.UserID)
	if errors.Is(err, cryptohook.ErrOtherAccount) {
		return setupError("database.uri: %w; give each account a database of its own", err)
	} else if err != nil {
		return fmt.Errorf("failed to read the database: %w", err)
	}
	deviceID := account.DeviceID
	if stored != "" {
		if deviceID != "" && deviceID != stored {
			return setupError("account.device_id: the database belongs to device %s, not to %s; correct it, or use a new database", stored, deviceID)
		}
		deviceID = stored
	}
	if account.AccessToken != "" {
		return b.checkToken(ctx, deviceID)
	}
	return b.loginWithPassword(ctx, deviceID)
}

func (b *Bot) checkToken(ctx context.Context, deviceID id.DeviceID) error {
	who, err := b.client.Whoami(ctx)
	switch {
	case errors.Is(err, mautrix.MUnknownToken):
		return b.believeRefusal(err)
	case err != nil:
		return fmt.Errorf("failed to ask whose token it is: %w", err)
	case who.UserID == "":
		return fmt.Errorf("failed to ask whose token it is: %w", errIncomplete)
	case who.UserID != b.config.Account.UserID:
		return setupError("account.access_token: it belongs to %s, and account.user_id is %s", who.UserID, b.config.Account.UserID)
	case who.DeviceID == "":
		return setupError("account.access_token: it belongs to no device, so nothing can be encrypted with it; log in to get one that does")
	case deviceID != "" && who.DeviceID != deviceID:
		return setupError("account.access_token: it belongs to device %s, and the bot's device is %s; use that device's token, or a new database", who.DeviceID, deviceID)
	}
	b.client.DeviceID = who.DeviceID
	return nil
}

func (b *Bot) loginWithPassword(ctx context.Context, deviceID id.DeviceID) error {
	_, err := b.client.Login(ctx, &mautrix.ReqLogin{
		Type:                     mautrix.AuthTypePassword,
		Identifier:               mautrix.UserIdentifier{Type: mautrix.IdentifierTypeUser, User: b.config.Account.UserID.String()},
		Password:                 b.config.Account.Password.Reveal(),
		DeviceID:                 deviceID,
		InitialDeviceDisplayName: deviceDisplayName,
		StoreCredentials:         true,
	})
	b.Mask.Hide(Secret(b.client.AccessToken))
	switch {
	case errors.Is(err, mautrix.MForbidden):
		return setupError("account.password: the homeserver refuses it for %s; check both", b.config.Account.UserID)
	case err != nil:
		return fmt.Errorf("failed to log in: %w", err)
	case b.client.UserID == "" || b.client.DeviceID == "" || b.client.AccessToken == "":
		return fmt.Errorf("failed to log in: %w", errIncomplete)
	case b.client.UserID != b.config.Account.UserID:
		return setupError("account.user_id: the homeserver knows this account as %s, not as %s", b.client.UserID, b.config.Account.UserID)
	}
	return nil
}

// install hooks the client's encryption and words what may be wrong with the database.
func (b *Bot) install(ctx context.Context) (err error) {
	b.self = b.newSelfWatch()
	b.reviser, b.invitations = b.newReviser(), b.newInvitations()
	if err = b.reviser.records.Upgrade(ctx); err != nil {
		return databaseError(fmt.Errorf("failed to upgrade the answers: %w", err))
	}
	b.hook, err = cryptohook.Install(ctx, b.client, cryptohook.Options{
		DB:            b.db,
		Owner:         b.owner,
		PickleKey:     []byte(b.config.Encryption.PickleKey.Reveal()),
		KeyWait:       max(b.config.Encryption.Wait, time.Millisecond),
		Requirement:   cryptohook.TrustRequirement(b.config.Trust.Requirement),
		VerifiedUsers: b.config.Trust.VerifiedUsers,
		OnChange:      b.reviser.changed,
		OnOwnIdentity: b.self.changed,
		Limits:        b.config.hookLimits(),
		Clock:         b.clock,
	})
	switch {
	case errors.Is(err, cryptohook.ErrPickleKey):
		return setupError("encryption.pickle_key: %w; give the key that the database was made with, or use a new database", err)
	case errors.Is(err, cryptohook.ErrOtherAccount), errors.Is(err, cryptohook.ErrOtherDevice), errors.Is(err, dbutil.ErrUnsupportedDatabaseVersion):
		return setupError("database.uri: %w", err)
	case errors.Is(err, cryptohook.ErrNoInterception):
		return setupError("%w", err)
	}
	return err
}

// publishDevice uploads the device's keys on first run, and makes sure on every other that they are still what is published.
func (b *Bot) publishDevice(ctx context.Context, published *mautrix.RespQueryKeys) error {
	mach := b.hook.Machine()
	own := mach.OwnIdentity()
	shared := mach.GetAccount().Shared
	keys, known := published.DeviceKeys[own.UserID][own.DeviceID]
	known = known && len(keys.Keys) > 0
	ours := keys.Keys.GetEd25519(own.DeviceID) == own.SigningKey && keys.Keys.GetCurve25519(own.DeviceID) == own.IdentityKey
	switch {
	// If the keys are there already, the answer to their upload was lost.
	case !shared && (!known || ours):
		if err := mach.ShareKeys(ctx, -1); err != nil {
			return fmt.Errorf("failed to publish the device's keys: %w", err)
		}
		return nil
	case !known && published.DeviceKeys[own.UserID] == nil:
		return fmt.Errorf("failed to ask for the bot's own keys: %w", errIncomplete)
	case !known:
		return setupError("device %s was deleted on the server, and its keys are gone. If it was not you: change the account's password, and look who else is logged in. Then move the database away, so that the bot makes a new device (its recovery key in account.recovery_key keeps its identity)", own.DeviceID)
	case !shared:
		return setupError("device %s has keys on the server that are not in the database: restore that database, or give account.device_id a new value", own.DeviceID)
	case !ours:
		return setupError("device %s has other keys on the server than in the database: another program uses this device; give the bot a device of its own", own.DeviceID)
	}
	return nil
}

func (b *Bot) queryOwnKeys(ctx context.Context) (*mautrix.RespQueryKeys, error) {
	published, err := b.client.QueryKeys(ctx, &mautrix.ReqQueryKeys{
		DeviceKeys: mautrix.DeviceKeysRequest{b.client.UserID: mautrix.DeviceIDList{}},
	})
	if err != nil {
		return nil, fmt.Errorf("failed to ask for the bot's own keys: %w", err)
	}
	return published, nil
}

// prepareIdentity sees to it that the bot has a cross-signing identity and that its device is signed by it. An identity that the
// account has is never replaced, unless the configuration says so.
func (b *Bot) prepareIdentity(ctx context.Context) error {
	published, err := b.queryOwnKeys(ctx)
	if err != nil {
		return err
	}
	if err = b.publishDevice(ctx, published); err != nil {
		return err
	}
	// An answer that does not show this device, which is published now, does not show either that the account has no identity.
	if published.DeviceKeys[b.client.UserID][b.client.DeviceID].UserID == "" {
		if published, err = b.queryOwnKeys(ctx); err != nil {
			return err
		} else if published.DeviceKeys[b.client.UserID][b.client.DeviceID].UserID == "" {
			return fmt.Errorf("failed to ask for the bot's own keys: %w", errIncomplete)
		}
	}
	masterKeys, exists := published.MasterKeys[b.client.UserID]
	masterKey := masterKeys.FirstKey()
	known, err := b.loadSeeds(ctx)
	if err != nil {
		return err
	}
	had, err := b.hook.HadIdentity(ctx)
	if err != nil {
		return err
	}
	// storage is the account's secret storage, if the recovery key is at hand.
	var storage *ssss.Key
	switch {
	case exists && known && b.ownMasterKey() == masterKey:
	case !exists && had && !b.config.Account.ResetIdentity:
		// Identities are replaced, but do not go away. A server that is faulty, or lies, is not to make the bot replace its own.
		return fmt.Errorf("the homeserver shows no encryption identity for %s any more, and did before: not making another one; ask its administrator, or set account.reset_identity to true if the identity is really lost", b.client.UserID)
	case !exists || b.config.Account.ResetIdentity:
		if storage, err = b.makeIdentity(ctx); err != nil {
			return err
		}
	case b.hasRecoveryKey():
		if storage, err = b.restoreIdentity(ctx, masterKey); err != nil {
			return err
		}
	case known:
		return setupError("the account %s has another encryption identity now (master key %s) than the bot's own (%s): somebody has reset it, or the homeserver is faulty or lies. If it was you, write the new recovery key into account.recovery_key. If not: change the account's password, log out every device of it that is not yours, set account.reset_identity to true, and tell the people in the bot's rooms", b.client.UserID, masterKey, b.ownMasterKey())
	default:
		return setupError("the account %s has an encryption identity (master key %s) whose secret keys the bot does not have: write its recovery key into account.recovery_key, or set account.reset_identity to true to replace it (then everybody who verified the account has to verify it anew)", b.client.UserID, masterKey)
	}
	if err = b.signOwnDevice(ctx); err != nil {
		return err
	}
	b.keepBackup(ctx, storage)
	b.tellOfOtherDevices(ctx)
	return nil
}

func (b *Bot) hasRecoveryKey() bool {
	return b.config.Account.RecoveryKey != "" && b.config.Account.RecoveryKey != Generate
}

func (b *Bot) ownMasterKey() id.Ed25519 {
	return b.hook.Machine().CrossSigningKeys.MasterKey.PublicKey()
}

// signOwnDevice signs the bot's device with its self-signing key where the server does not show that it is.
func (b *Bot) signOwnDevice(ctx context.Context) error {
	mach := b.hook.Machine()
	published, err := b.queryOwnKeys(ctx)
	if err != nil {
		return err
	}
	keys := published.DeviceKeys[b.client.UserID][b.client.DeviceID]
	selfSigningKey := mach.CrossSigningKeys.SelfSigningKey.PublicKey()
	if signed, _ := signatures.VerifySignatureJSON(&keys, b.client.UserID, selfSigningKey.String(), selfSigningKey); !signed {
		if err = mach.SignOwnDevice(ctx, mach.OwnIdentity()); err != nil {
			return fmt.Errorf("failed to sign the bot's device: %w", err)
		}
		if err = mach.SignOwnMasterKey(ctx); err != nil {
			return fmt.Errorf("failed to sign the bot's master key with its device: %w", err)
		}
	}
	// mautrix keeps its own record of whose device is signed.
	if _, err = mach.FetchKeys(ctx, []id.UserID{b.client.UserID}, true); err != nil {
		return fmt.Errorf("failed to fetch the bot's own keys: %w", err)
	}
	// That has made it forget our public keys, which it works out anew at first use, without a lock: nobody else is at work yet.
	if _, err = mach.GetOwnCrossSigningPublicKeys(ctx); err != nil {
		return fmt.Errorf("failed to work out the bot's public keys: %w", err)
	}
	return nil
}

// openSecrets opens the account's secret storage with the recovery key.
func (b *Bot) openSecrets(ctx context.Context) (*ssss.Key, error) {
	keyID, keyData, err := b.hook.Machine().SSSS.GetDefaultKeyData(ctx)
	if errors.Is(err, mautrix.MNotFound) || errors.Is(err, ssss.ErrNoDefaultKeyAccountDataEvent) {
		return nil, setupError("account.recovery_key: the account keeps no secrets on the server that a recovery key could open; set account.reset_identity to true to make a new identity")
	} else if err != nil {
		return nil, fmt.Errorf("failed to look for the account's secret storage: %w", err)
	}
	key, err := keyData.VerifyRecoveryKey(keyID, b.config.Account.RecoveryKey.Reveal())
	if err != nil {
		return nil, setupError("account.recovery_key: it does not open the account's secret storage (%w)", err)
	}
	return key, nil
}

// restoreIdentity gets the secret keys of the identity that the account has, by its recovery key, and gives the secret storage that
// they were in.
func (b *Bot) restoreIdentity(ctx context.Context, masterKey id.Ed25519) (*ssss.Key, error) {
	mach := b.hook.Machine()
	key, err := b.openSecrets(ctx)
	if err != nil {
		return nil, err
	}
	if err = mach.FetchCrossSigningKeysFromSSSS(ctx, key); err != nil {
		return nil, fmt.Errorf("failed to fetch the identity's secret keys: %w", err)
	}
	if b.ownMasterKey() != masterKey {
		return nil, setupError("account.recovery_key: it belongs to another identity (master key %s) than the account has now (%s): somebody has reset the account's identity since. If it was you, write the new recovery key there. If not: change the account's password, log out every device of it that is not yours, set account.reset_identity to true, and tell the people in the bot's rooms", b.ownMasterKey(), masterKey)
	}
	if err = b.storeSeeds(ctx, mach.CrossSigningKeys); err != nil {
		return nil, err
	}
	b.log.Info().Stringer("master_key", masterKey).Msg("Restored the bot's identity by its recovery key")
	return key, nil
}

// makeIdentity makes a new cross-signing identity. Its secret keys are safe here, and its recovery key is told, before anything
// of it is published: a crash in between can be gone on from. It gives the secret storage that they are in.
func (b *Bot) makeIdentity(ctx context.Context) (*ssss.Key, error) {
	mach := b.hook.Machine()
	key, err := b.makeSecretStorage(ctx)
	if err != nil {
		return nil, fmt.Errorf("failed to make a secret storage: %w", err)
	}
	keys, err := mach.GenerateCrossSigningKeys()
	if err != nil {
		return nil, fmt.Errorf("failed to make cross-signing keys: %w", err)
	}
	if err = mach.UploadCrossSigningKeysToSSSS(ctx, key, keys); err != nil {
		return nil, fmt.Errorf("failed to store the identity's secret keys on the server: %w", err)
	}
	if err = b.tellRecoveryKey(key.RecoveryKey()); err != nil {
		return nil, err
	}
	if err = b.hook.RenewBackup(ctx, keys.MasterKey.PublicKey()); err != nil {
		return nil, err
	}
	if err = b.storeSeeds(ctx, keys); err != nil {
		return nil, err
	}
	if err = mach.SSSS.SetDefaultKeyID(ctx, key.ID); err != nil {
		return nil, fmt.Errorf("failed to make the secret storage the default: %w", err)
	}
	err = mach.PublishCrossSigningKeys(ctx, keys, b.confirmByPassword)
	if isUnauthorized(err) && b.config.Account.Password == "" {
		return nil, setupError("account.password: the homeserver wants the password before it takes a new identity; give it once, together with the token")
	} else if err != nil {
		return nil, fmt.Errorf("failed to publish the bot's identity: %w", err)
	}
	b.log.Info().Stringer("master_key", keys.MasterKey.PublicKey()).Msg("Made a new identity for the bot")
	return key, nil
}

// makeSecretStorage makes one that the recovery key in the configuration opens, if there is one: it may have been written there before a
// crash or a loss of power, and is what somebody has kept.
func (b *Bot) makeSecretStorage(ctx context.Context) (*ssss.Key, error) {
	storage := b.hook.Machine().SSSS
	if !b.hasRecoveryKey() {
		return storage.GenerateAndUploadKey(ctx, "")
	}
	key, err := ssss.WrapKey(utils.DecodeBase58RecoveryKey(b.config.Account.RecoveryKey.Reveal()), nil)
	if err == nil {
		err = storage.SetKeyData(ctx, key.ID, key.Metadata)
	}
	return key, err
}

func isUnauthorized(err error) bool {
	var httpError mautrix.HTTPError
	return errors.As(err, &httpError) && httpError.IsStatus(http.StatusUnauthorized)
}

// confirmByPassword answers the homeserver's question whether it is really us.
func (b *Bot) confirmByPassword(question *mautrix.RespUserInteractive) any {
	if b.config.Account.Password == "" {
		return nil
	}
	return &mautrix.ReqUIAuthLogin{
		BaseAuthData: mautrix.BaseAuthData{Type: mautrix.AuthTypePassword, Session: question.Session},
		User:         b.client.UserID.String(),
		Password:     b.config.Account.Password.Reveal(),
	}
}

// tellRecoveryKey prints the recovery key once, and writes it into the configuration only if that asks for it.
func (b *Bot) tellRecoveryKey(recoveryKey string) error {
	if recoveryKey == b.config.Account.RecoveryKey.Reveal() {
		return nil
	}
	b.Mask.Hide(Secret(recoveryKey))
	if b.config.Account.RecoveryKey == Generate {
		if err := b.config.StoreRecoveryKey(recoveryKey); err != nil {
			return fmt.Errorf("failed to write the recovery key into the configuration: %w", err)
		}
		return nil
	}
	_, err := fmt.Fprintf(b.Output, "\nThe bot's recovery key, shown this once:\n\n    %s\n\nKeep it in a safe place. With it the bot keeps its identity when its database is lost (account.recovery_key).\n\n", recoveryKey)
	return err
}

// The identity's secret keys are kept in the crypto store under the names of the specification, encrypted with the pickle key.
// https://spec.matrix.org/v1.16/client-server-api/#cross-signing
func (b *Bot) storeSeeds(ctx context.Context, keys *crypto.CrossSigningKeysCache) error {
	secrets := map[id.Secret][]byte{
		id.SecretXSMaster: keys.MasterKey.Seed(), id.SecretXSSelfSigning: keys.SelfSigningKey.Seed(), id.SecretXSUserSigning: keys.UserSigningKey.Seed(),
	}
	for name, seed := range secrets {
		if err := b.hook.Machine().CryptoStore.PutSecret(ctx, name, base64.StdEncoding.EncodeToString(seed)); err != nil {
			return fmt.Errorf("failed to store the identity's secret keys: %w", err)
		}
	}
	return nil
}

// loadSeeds takes the identity's secret keys from the database, if they are there.
func (b *Bot) loadSeeds(ctx context.Context) (known bool, err error) {
	var seeds crypto.CrossSigningSeeds
	for name, seed := range map[id.Secret]*jsonbytes.UnpaddedURLBytes{
		id.SecretXSMaster: &seeds.MasterKey, id.SecretXSSelfSigning: &seeds.SelfSigningKey, id.SecretXSUserSigning: &seeds.UserSigningKey,
	} {
		secret, err := b.hook.Machine().CryptoStore.GetSecret(ctx, name)
		if err != nil {
			return false, fmt.Errorf("failed to read the identity's secret keys: %w", err)
		}
		if secret == "" {
			return false, nil
		}
		if *seed, err = base64.StdEncoding.DecodeString(secret); err != nil {
			return false, fmt.Errorf("failed to read the identity's secret keys: %w", err)
		}
	}
	if err = b.hook.Machine().ImportCrossSigningKeys(seeds); err != nil {
		return false, fmt.Errorf("failed to use the identity's secret keys: %w", err)
	}
	return true, nil
}
